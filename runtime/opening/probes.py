"""File of a tower's opening probes: inputs and expected vectors for its opening check."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ManifestError
from runtime.manifest import ImagePreprocessing, Modality, TextPreprocessing
from runtime.typed_json import OPTIONAL

__all__ = ["OPENING_FILE", "OpeningProbes", "space_of_manifest"]

OPENING_FILE = "opening.npz"
"""File name in a tower's version folder, beside the graph; Triton's own backends read only the graph."""

_FORMAT = "babeltower-opening/1"
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class OpeningProbes:
    """Inputs for an opened tower and the vectors it must return.

    Attributes:
        texts, languages: Texts and languages of a text tower's rows; empty for images.
        images: Image files of an image tower's rows; empty for texts.
        runs: Inputs of each run; concatenated, their rows are the rows above, in order.
        vectors: PyTorch's vectors by graph output: float32 (rows, width).
        figures: Engine → output → cosine of each row with PyTorch's vector, as measured at export.
        measured_on: Machine that the figures were measured on; see ``Variant``.
        space: Facts of the manifest that determine the runs' inputs, see ``space_of_manifest``; empty in
            older files.
    """

    modality: Modality
    runs: tuple[Mapping[str, NDArray[Any]], ...]
    vectors: Mapping[str, NDArray[np.float32]]
    texts: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    images: tuple[bytes, ...] = ()
    figures: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    measured_on: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """Number of probes."""
        return len(self.texts) or len(self.images)

    def name_of_row(self, row: int) -> str:
        """Return the name of a probe for messages."""
        if self.modality is Modality.IMAGE:
            return f"probe image {row}"
        text = self.texts[row]
        shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
        return f"probe text {shown!r} ({self.languages[row]})"

    def save(self, path: Path) -> None:
        """Write the probes to an ``.npz`` file."""
        about = {
            "format": _FORMAT,
            "modality": self.modality.value,
            "texts": list(self.texts),
            "languages": list(self.languages),
            "image_bytes": [len(image) for image in self.images],
            "n_runs": len(self.runs),
            "outputs": list(self.vectors),
            "figures": self.figures,
            "measured_on": self.measured_on,
            "space": self.space,
        }
        arrays: dict[str, Any] = {
            f"run{i}.{name}": array for i, run in enumerate(self.runs) for name, array in run.items()
        }
        arrays |= {f"vectors.{name}": array.astype(np.float32) for name, array in self.vectors.items()}
        arrays["images"] = np.frombuffer(b"".join(self.images), dtype=np.uint8)
        arrays["about"] = np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def read(cls, path: Path) -> OpeningProbes:
        """Read probes written by ``save``.

        Raises:
            ManifestError: the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return _probes_from_arrays({name: arrays[name] for name in arrays.files})
        except FileNotFoundError:
            raise ManifestError(
                f"{path} is missing, so the tower cannot be checked when it is opened. Copy the repository "
                "again, or export the checkpoint again."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, BadZipFile) as error:
            raise ManifestError(
                f"{path} cannot be read: {type(error).__name__}: {error}. Copy the repository again, or "
                "export the checkpoint again."
            ) from error


def space_of_manifest(
    fingerprint: str, preprocessing: TextPreprocessing | ImagePreprocessing
) -> dict[str, Any]:
    """Return the manifest's facts that determine a tower's inputs and space, as plain JSON values."""
    settings = dataclasses.asdict(preprocessing)
    for entry in dataclasses.fields(preprocessing):  # so that older probes, which lack these, still match
        if entry.metadata.get(OPTIONAL) and settings[entry.name] == entry.default:
            del settings[entry.name]
    facts = {"fingerprint": fingerprint, "preprocessing": settings}
    plain: dict[str, Any] = json.loads(json.dumps(facts, sort_keys=True))
    return plain


def _probes_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> OpeningProbes:
    about = json.loads(arrays["about"].tobytes())
    if about["format"] != _FORMAT:
        raise ValueError(f"its format is {about['format']!r}, expected {_FORMAT!r}")
    ends = np.cumsum([0, *about["image_bytes"]]).tolist()
    images = arrays["images"].tobytes()
    return OpeningProbes(
        modality=Modality(about["modality"]),
        runs=tuple(
            {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"run{i}.")}
            for i in range(about["n_runs"])
        ),
        vectors={name: arrays[f"vectors.{name}"] for name in about["outputs"]},
        texts=tuple(about["texts"]),
        languages=tuple(about["languages"]),
        images=tuple(images[start:end] for start, end in itertools.pairwise(ends)),
        figures={
            engine: {name: tuple(map(float, row)) for name, row in outputs.items()}
            for engine, outputs in about["figures"].items()
        },
        measured_on=about["measured_on"],
        space=about.get("space", {}),
    )
