"""Every error that babeltower raises on purpose.

    BabeltowerError
    ├── ManifestError          the repository's manifest is missing, malformed or does not fit its files
    ├── CheckpointError        a checkpoint cannot be read, or is of no known family
    ├── ExportError            a graph or repository could not be written
    │   └── ParityError        the exported model does not agree with PyTorch
    ├── EngineError            an engine, provider or precision that was asked for is not to be had
    │   └── OpeningCheckError  an opened tower does not give PyTorch's vectors on this machine
    ├── InputError             a text, image or option that cannot be embedded
    │   ├── LanguageError      a language is missing, unknown, or not spoken by the tower
    │   └── ImageError         bytes that are no decodable image
    ├── ServerError            a server cannot be reached, or does not answer as it should
    │   └── UnansweredError    it went away; names the inputs without an answer, and holds the answers
    ├── RolloutError           a version's answers are wrong, or it does not load; the old one is served
    ├── DatasetError           an evaluation set's files are missing or malformed
    └── CorpusError            a run over a corpus cannot start, go on, or be written

A message says what failed, what was found against what was expected, and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "BabeltowerError",
    "CheckpointError",
    "CorpusError",
    "DatasetError",
    "EngineError",
    "ExportError",
    "ImageError",
    "InputError",
    "LanguageError",
    "ManifestError",
    "OpeningCheckError",
    "ParityError",
    "RolloutError",
    "ServerError",
    "UnansweredError",
]


class BabeltowerError(Exception):
    """Root of every deliberate error; catch it to catch them all."""


class ManifestError(BabeltowerError):
    """The repository's manifest is missing, malformed or does not fit its files."""


class CheckpointError(BabeltowerError):
    """A checkpoint cannot be read, or is of no known family."""


class ExportError(BabeltowerError):
    """A graph or repository could not be written."""


class ParityError(ExportError):
    """The exported model does not agree with PyTorch; nothing was published."""


class EngineError(BabeltowerError):
    """An engine, provider or precision that was asked for is not to be had; no other is chosen silently."""


class MissingPackageError(EngineError):
    """An optional package is not installed; the message says what to install."""


class OpeningCheckError(EngineError):
    """An opened tower does not give PyTorch's vectors on this machine, within what its export measured.

    Attributes:
        tower: Name of its Triton model.
        probe: The worst probe.
        cosine: Its vector's cosine with PyTorch's; NaN where it has none.
        required: The least that passes.
    """

    def __init__(
        self,
        message: str,
        *,
        tower: str = "",
        probe: str = "",
        cosine: float = float("nan"),
        required: float = float("nan"),
    ) -> None:
        super().__init__(message)
        self.tower, self.probe, self.cosine, self.required = tower, probe, cosine, required


class InputError(BabeltowerError, ValueError):
    """A text, image or option that cannot be embedded."""


class LanguageError(InputError):
    """A language is missing, unknown, or not spoken by the tower."""


class ImageError(InputError):
    """Bytes that are no decodable image."""


class DatasetError(BabeltowerError):
    """An evaluation set's files are missing or malformed."""


class CorpusError(BabeltowerError):
    """A run over a corpus cannot start, go on, or be written; what is in its journal stays."""


class ServerError(BabeltowerError):
    """A server cannot be reached, or does not answer as it should."""


class RolloutError(BabeltowerError):
    """A version's answers are wrong, or it does not load; what was served before is served."""


class UnansweredError(ServerError):
    """The server went away before all inputs were answered; pass those in ``unanswered`` again.

    Attributes:
        unanswered: Places, in the caller's input, of the inputs that have no answer, ascending.
        answered: Places of those that have one, ascending; what ``iter_*`` had yielded before is left out.
        vectors: Theirs: (answered, dim) in the asked encoding.
    """

    def __init__(
        self, reason: str, *, unanswered: Sequence[int], answered: Sequence[int], vectors: NDArray[Any]
    ) -> None:
        self.reason = reason
        self.unanswered = tuple(unanswered)
        self.answered = tuple(answered)
        self.vectors = vectors
        super().__init__(
            f"{reason} {len(self.unanswered)} inputs have no answer: {_ranges(self.unanswered)}; "
            f"{len(self.answered)} have one. Pass those of .unanswered again when the server is back."
        )


def _ranges(places: Sequence[int]) -> str:
    """``0-3, 7``; the first few."""
    ranges: list[list[int]] = []
    for place in places:
        if ranges and place == ranges[-1][1] + 1:
            ranges[-1][1] = place
        else:
            ranges.append([place, place])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:8]]
    return ", ".join(shown) + (f", and {len(ranges) - 8} more ranges" if len(ranges) > 8 else "")


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
