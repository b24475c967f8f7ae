"""babeltower's runtime: opens exported models and embeds texts and images.

    from runtime import Encoder

    with Encoder.open("repository/nllb-clip-base") as encoder:
        vectors = encoder.embed_texts(["um gato preto"], language="por_Latn")

Modules that need an engine are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from runtime.errors import (
    BabeltowerError,
    ChangedInputError,
    CheckpointError,
    CorpusError,
    DamagedFileError,
    DamagedVectorsError,
    DatasetError,
    EngineError,
    ExportError,
    ImageError,
    InputError,
    InputFaultError,
    LanguageError,
    ManifestError,
    MissingPackageError,
    MissingSourceError,
    OpeningCheckError,
    OutputFaultError,
    ParityError,
    RepositoryInUseError,
    RolloutError,
    ServerError,
    UnansweredError,
    UnfinishedRunError,
)

if TYPE_CHECKING:
    from runtime.embeddings import Encoding
    from runtime.encoder import Encoder
    from runtime.indexes.exact import Index
    from runtime.indexes.vector_index import VectorIndex
    from runtime.manifest import Engine, Manifest, Modality, Precision
    from runtime.preprocessing.languages import flores_from_code
    from runtime.zeroshot import Classifier

__all__ = [
    "BabeltowerError",
    "ChangedInputError",
    "CheckpointError",
    "Classifier",
    "CorpusError",
    "DamagedFileError",
    "DamagedVectorsError",
    "DatasetError",
    "Encoder",
    "Encoding",
    "Engine",
    "EngineError",
    "ExportError",
    "ImageError",
    "Index",
    "InputError",
    "InputFaultError",
    "LanguageError",
    "Manifest",
    "ManifestError",
    "MissingPackageError",
    "MissingSourceError",
    "Modality",
    "OpeningCheckError",
    "OutputFaultError",
    "ParityError",
    "Precision",
    "RepositoryInUseError",
    "RolloutError",
    "ServerError",
    "UnansweredError",
    "UnfinishedRunError",
    "VectorIndex",
    "flores_from_code",
]

_MODULES = {
    "Classifier": "runtime.zeroshot",
    "Encoder": "runtime.encoder",
    "Encoding": "runtime.embeddings",
    "Engine": "runtime.manifest",
    "Index": "runtime.indexes.exact",
    "Manifest": "runtime.manifest",
    "Modality": "runtime.manifest",
    "Precision": "runtime.manifest",
    "VectorIndex": "runtime.indexes.vector_index",
    "flores_from_code": "runtime.preprocessing.languages",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
