"""A refused input as a line of text between a server and its client: ``LanguageError: Language 'tlh' …``."""

from __future__ import annotations

from runtime.errors import ImageError, InputError, LanguageError

__all__ = ["error_from_message", "message_from_error"]

_KINDS = {kind.__name__: kind for kind in (InputError, LanguageError, ImageError)}


def message_from_error(error: InputError) -> str:
    """The class's name in front; of a class that the client does not know, that of its nearest base."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS)
    return f"{name}: {error}"


def error_from_message(message: str, *, place: str) -> InputError:
    """The error that the same input raises in process, with its place in front.

    A message without a class is the server's own, of a request that it could not read: an ``InputError``.
    """
    name, _, rest = message.partition(": ")
    kind = _KINDS.get(name)
    return InputError(f"{place}: {message}") if kind is None else kind(f"{place}: {rest}")
