"""Errors that babeltower raises deliberately.

    BabeltowerError
    ├── ManifestError          the repository's manifest is missing, malformed or does not match its files
    ├── CheckpointError        a checkpoint cannot be read, or its family is unknown
    ├── ExportError            a graph or repository could not be written
    │   └── ParityError        the exported model does not agree with PyTorch
    ├── EngineError            a requested engine, provider or precision is not available
    │   ├── MissingPackageError  an optional package is not installed
    │   └── OpeningCheckError  an opened tower does not reproduce PyTorch's vectors on this machine
    ├── InputError             a text, image or option that cannot be embedded
    │   ├── LanguageError      a language is missing, unknown, or not supported by the tower
    │   ├── ImageError         an image that cannot be decoded
    │   ├── MissingSourceError  a source's files do not exist
    │   ├── DamagedFileError   a source's file is cut off or damaged
    │   ├── DamagedVectorsError  a folder of vectors or an index lacks files, has strays, or a byte flipped
    │   └── UnfinishedRunError   a folder of vectors is not finished: its run can go on
    ├── ServerError            a server cannot be reached, or answers incorrectly
    │   └── UnansweredError    it became unavailable; lists unanswered inputs and holds the answers
    ├── RolloutError           a version's answers are wrong, or it does not load; the old one is served
    ├── RepositoryInUseError   another command holds the lock of the repository
    ├── DatasetError           an evaluation set's files are missing or malformed
    └── CorpusError            a run over a corpus cannot start, continue, or be written
        ├── ChangedInputError  the source is not the one that the existing parts were read from
        ├── InputFaultError    storage failed while a source was read; the same command may succeed later
        └── OutputFaultError   storage failed where the output is, such as a full disk; likewise

Each message says what failed, what was found and expected, and the remedy. ``exit_code`` is what a command
returns for an error of the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "BabeltowerError",
    "ChangedInputError",
    "CheckpointError",
    "CorpusError",
    "DamagedFileError",
    "DamagedVectorsError",
    "DatasetError",
    "EngineError",
    "ExportError",
    "ImageError",
    "InputError",
    "InputFaultError",
    "LanguageError",
    "ManifestError",
    "MissingPackageError",
    "MissingSourceError",
    "OpeningCheckError",
    "OutputFaultError",
    "ParityError",
    "RepositoryInUseError",
    "RolloutError",
    "ServerError",
    "UnansweredError",
    "UnfinishedRunError",
]


class BabeltowerError(Exception):
    """Base class of every deliberate error; ``exit_code`` is what a command returns for it."""

    exit_code: ClassVar[int] = 1


class ManifestError(BabeltowerError):
    """The repository's manifest is missing, malformed or does not match its files."""


class CheckpointError(BabeltowerError):
    """A checkpoint cannot be read, or its family is unknown."""


class ExportError(BabeltowerError):
    """A graph or repository could not be written."""


class ParityError(ExportError):
    """The exported model does not agree with PyTorch; nothing was published."""


class EngineError(BabeltowerError):
    """A requested engine, provider or precision is not available; there is no silent fallback."""


class MissingPackageError(EngineError):
    """An optional package is not installed; the message says what to install."""


class OpeningCheckError(EngineError):
    """An opened tower does not reproduce PyTorch's vectors on this machine within the exported limits.

    Attributes:
        tower: Name of the tower's Triton model.
        probe: Worst probe.
        cosine: Cosine of the worst probe's vector with PyTorch's; NaN if undefined.
        required: Lowest cosine that passes.
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
    """A language is missing, unknown, or not supported by the tower."""


class ImageError(InputError):
    """An image that cannot be decoded."""


class MissingSourceError(InputError):
    """A source's files do not exist."""

    exit_code = 66


class DamagedFileError(InputError):
    """A source's file is cut off or damaged; it is read to its proven end or not at all."""

    exit_code = 65


class DamagedVectorsError(InputError):
    """A folder of vectors or an index lacks files, has strays, or was changed since it was written."""

    exit_code = 65


class UnfinishedRunError(InputError):
    """A folder of vectors is not finished: its run can go on."""

    exit_code = 75


class DatasetError(BabeltowerError):
    """An evaluation set's files are missing or malformed."""


class CorpusError(BabeltowerError):
    """A run over a corpus cannot start, continue, or be written; finished parts in its journal are kept."""


class ChangedInputError(CorpusError):
    """The source is not the one that the existing parts were read from; the message names its files."""

    exit_code = 65


class InputFaultError(CorpusError):
    """Storage failed while a source was read, also when tried again; the same command may succeed later."""

    exit_code = 75


class OutputFaultError(CorpusError):
    """Storage failed where the output is, such as a full disk; the same command may succeed later."""

    exit_code = 75


class ServerError(BabeltowerError):
    """A server cannot be reached, or answers incorrectly."""


class RolloutError(BabeltowerError):
    """A version's answers are wrong, or it does not load; the previous version is still served."""


class RepositoryInUseError(BabeltowerError):
    """Another command changes the repository; the message says which, and since when."""


class UnansweredError(ServerError):
    """The server became unavailable before all inputs were answered; retry those in ``unanswered``.

    Attributes:
        unanswered: Positions in the caller's input without an answer, ascending.
        answered: Positions with an answer, ascending, without those that ``iter_*`` has already yielded.
        vectors: Vectors of ``answered``: (answered, dim) in the requested encoding.
    """

    def __init__(
        self, reason: str, *, unanswered: Sequence[int], answered: Sequence[int], vectors: NDArray[Any]
    ) -> None:
        self.reason = reason
        self.unanswered = tuple(unanswered)
        self.answered = tuple(answered)
        self.vectors = vectors
        super().__init__(
            f"{reason} {len(self.unanswered)} inputs are unanswered: {_ranges(self.unanswered)}; "
            f"{len(self.answered)} are answered. Retry those in .unanswered when the server is back."
        )


def _ranges(places: Sequence[int]) -> str:
    """Format positions as ranges, such as ``0-3, 7``; at most eight are listed."""
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
