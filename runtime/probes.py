"""The probe set of a model: texts in every language and images, with the vectors that PyTorch made of them.

``NAME.probes.npz`` lies beside the manifest; a server can be asked the same questions at any time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ManifestError

__all__ = ["Probes", "probes_path"]


def probes_path(model: str | os.PathLike[str]) -> Path:
    """``REPOSITORY/NAME`` → ``REPOSITORY/NAME.probes.npz``."""
    path = Path(model)
    return path.with_name(f"{path.name}.probes.npz")


@dataclass(frozen=True, slots=True)
class Probes:
    """What is asked, and what the family's own library answers.

    Attributes:
        fingerprint: The embedding space.
        texts: May be blank, or longer than the context.
        languages: FLORES-200, one a text.
        images: Image files.
        text_vectors: float32 (texts, dim), L2-normalised.
        image_vectors: float32 (images, dim), L2-normalised.
    """

    fingerprint: str
    texts: tuple[str, ...]
    languages: tuple[str, ...]
    images: tuple[bytes, ...]
    text_vectors: NDArray[np.float32]
    image_vectors: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with beside.open("wb") as file:
                np.savez_compressed(
                    file,
                    fingerprint=np.asarray(self.fingerprint),
                    # NumPy cuts trailing zero characters off strings; bytes with lengths keep any text
                    **_packed("texts", [text.encode() for text in self.texts]),
                    languages=np.asarray(self.languages, dtype=np.str_),
                    **_packed("images", self.images),
                    text_vectors=self.text_vectors.astype(np.float32),
                    image_vectors=self.image_vectors.astype(np.float32),
                )
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def read(cls, model: str | os.PathLike[str]) -> Probes:
        """Read the probes of ``REPOSITORY/NAME``.

        Raises:
            ManifestError: there are none, or they are damaged.
        """
        path = probes_path(model)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                probes = cls(
                    fingerprint=str(arrays["fingerprint"]),
                    texts=tuple(t.decode() for t in _unpacked("texts", arrays)),
                    languages=tuple(arrays["languages"].tolist()),
                    images=_unpacked("images", arrays),
                    text_vectors=arrays["text_vectors"],
                    image_vectors=arrays["image_vectors"],
                )
        except FileNotFoundError:
            raise ManifestError(
                f"{path} is missing: the model has no probe set, and a rollout would not know right from "
                "wrong. Export the checkpoint again."
            ) from None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ManifestError(f"{path} cannot be read: {error}. Export the checkpoint again.") from error
        n_rows = (len(probes.languages), len(probes.text_vectors), len(probes.image_vectors))
        if n_rows != (len(probes.texts), len(probes.texts), len(probes.images)):
            raise ManifestError(f"{path} holds {n_rows} vectors for other numbers of probes. Export again.")
        return probes


def _packed(name: str, items: tuple[bytes, ...] | list[bytes]) -> dict[str, Any]:
    return {
        name: np.frombuffer(b"".join(items), dtype=np.uint8),
        f"{name}_lengths": np.asarray([len(item) for item in items], dtype=np.int64),
    }


def _unpacked(name: str, arrays: np.lib.npyio.NpzFile) -> tuple[bytes, ...]:
    data, ends = arrays[name].tobytes(), np.cumsum(arrays[f"{name}_lengths"]).tolist()
    return tuple(data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)) if ends else ()
