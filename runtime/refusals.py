"""Input errors as messages between server and client: ``LanguageError: Language 'tlh' …``."""

from __future__ import annotations

from runtime.errors import ImageError, InputError, LanguageError

__all__ = ["error_from_message", "message_from_error"]

_KINDS = {kind.__name__: kind for kind in (InputError, LanguageError, ImageError)}


def message_from_error(error: InputError) -> str:
    """Format an error with its class name, or its nearest base class known to the client, in front."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS)
    return f"{name}: {error}"


def error_from_message(message: str, *, place: str) -> InputError:
    """Recreate the error that the same input raises in process, with its position in front.

    A message without a class comes from the server itself, for an invalid request, and is an ``InputError``.
    """
    name, _, rest = message.partition(": ")
    kind = _KINDS.get(name)
    return InputError(f"{place}: {message}") if kind is None else kind(f"{place}: {rest}")
