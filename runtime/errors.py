"""Every error that babeltower raises on purpose.

    BabeltowerError
    ├── ManifestError          the repository's manifest is missing, malformed or does not fit its files
    ├── CheckpointError        a checkpoint cannot be read, or is of no known family
    ├── ExportError            a graph or repository could not be written
    │   └── ParityError        the exported model does not agree with PyTorch
    ├── EngineError            an engine, provider or precision that was asked for is not to be had
    ├── InputError             a text, image or option that cannot be embedded
    │   ├── LanguageError      a language is missing, unknown, or not spoken by the tower
    │   └── ImageError         bytes that are no decodable image
    ├── DatasetError           an evaluation set's files are missing or malformed
    └── CorpusError            a run over a corpus cannot start, go on, or be written

A message says what failed, what was found against what was expected, and the remedy.
"""

from __future__ import annotations

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
    "ParityError",
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
