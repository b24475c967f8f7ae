"""Probe set of a model: texts in every language and images, with PyTorch's vectors.

``NAME.probes.npz`` lies beside the manifest, and a server can be checked against it at any time. Every opened
tower is checked with a few of the probes, chosen by ``opening_texts`` and ``opening_images``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ManifestError
from runtime.manifest import FileRecord, TextPreprocessing, verify_file
from runtime.preprocessing.batching import inputs_of_batch, padded_batch
from runtime.storage import replace_file

__all__ = ["Probes", "opening_images", "opening_texts", "probes_path", "token_runs"]

_N_SHORT_TEXTS, _N_IMAGES = 3, 3
_LONGEST, _SHORT = 96, 24
"""Maximum tokens of the long opening text and of the others, to keep the opening of a model fast."""


def probes_path(model: str | os.PathLike[str]) -> Path:
    """Return a model's probe file: ``REPOSITORY/NAME`` → ``REPOSITORY/NAME.probes.npz``."""
    path = Path(model)
    return path.with_name(f"{path.name}.probes.npz")


@dataclass(frozen=True, slots=True)
class Probes:
    """Probe inputs and the vectors computed by the family's own library.

    Attributes:
        fingerprint: Fingerprint of the embedding space.
        texts: Texts; may be blank, or longer than the context.
        languages: FLORES-200 codes, one per text.
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

        def write(unfinished: Path) -> None:
            with unfinished.open("wb") as file:
                np.savez_compressed(
                    file,
                    fingerprint=np.asarray(self.fingerprint),
                    # NumPy strips trailing NUL characters from strings; bytes with lengths keep any text
                    **_packed("texts", [text.encode() for text in self.texts]),
                    languages=np.asarray(self.languages, dtype=np.str_),
                    **_packed("images", self.images),
                    text_vectors=self.text_vectors.astype(np.float32),
                    image_vectors=self.image_vectors.astype(np.float32),
                )

        replace_file(path, write)

    @classmethod
    def read(cls, model: str | os.PathLike[str], record: FileRecord | None = None) -> Probes:
        """Read the probes of ``REPOSITORY/NAME``.

        Args:
            record: Record in the manifest, if any, to verify the file against.

        Raises:
            ManifestError: the file is missing, damaged, or not the one in the manifest.
        """
        path = probes_path(model)
        if record is not None:
            verify_file(path.parent, record)
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
                f"{path} is missing: without the model's probe set, its answers cannot be checked. Export "
                "the checkpoint again."
            ) from None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ManifestError(f"{path} cannot be read: {error}. Export the checkpoint again.") from error
        n_rows = (len(probes.languages), len(probes.text_vectors), len(probes.image_vectors))
        if n_rows != (len(probes.texts), len(probes.texts), len(probes.images)):
            raise ManifestError(
                f"{path} is inconsistent: it has {n_rows} languages, text vectors and image vectors for "
                f"{len(probes.texts)} texts and {len(probes.images)} images. Export again."
            )
        return probes


def _packed(name: str, items: tuple[bytes, ...] | list[bytes]) -> dict[str, Any]:
    return {
        name: np.frombuffer(b"".join(items), dtype=np.uint8),
        f"{name}_lengths": np.asarray([len(item) for item in items], dtype=np.int64),
    }


def _unpacked(name: str, arrays: np.lib.npyio.NpzFile) -> tuple[bytes, ...]:
    data, ends = arrays[name].tobytes(), np.cumsum(arrays[f"{name}_lengths"]).tolist()
    return tuple(data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)) if ends else ()


def opening_texts(
    texts: Sequence[str], languages: Sequence[str], lengths: Sequence[int], vectors: NDArray[np.float32]
) -> list[int]:
    """Choose the probe rows for opening a text tower: three short texts, then a long one.

    The short texts have three different lengths and, if possible, different languages; among the candidates,
    each is the text whose vector is least similar to those already chosen.

    Args:
        lengths: Text lengths in tokens.
        vectors: PyTorch's vectors, (texts, dim).
    """
    visible = [row for row, text in enumerate(texts) if text.strip()]
    within = [row for row in visible if lengths[row] <= _LONGEST] or visible or list(range(len(texts)))
    if not within:
        return []
    longest = max(within, key=lambda row: (lengths[row], -row))
    short = sorted(
        (row for row in within if row != longest and lengths[row] <= _SHORT),
        key=lambda row: (lengths[row], row),
    )
    chosen = [longest]
    for part in np.array_split(np.asarray(short, dtype=np.int64), _N_SHORT_TEXTS):
        spoken = {languages[row] for row in chosen}
        rows = part.tolist()
        fresh = [row for row in rows if languages[row] not in spoken] or rows
        if fresh:
            chosen.append(_least_alike(fresh, chosen, vectors))
    return [*sorted(chosen[1:]), longest]


def opening_images(vectors: NDArray[np.float32]) -> list[int]:
    """Choose the probe rows for opening an image tower: the least similar vectors of (images, dim)."""
    rows, chosen = list(range(len(vectors))), list[int]()
    while rows and len(chosen) < _N_IMAGES:
        chosen.append(_least_alike(rows, chosen or rows, vectors))
        rows.remove(chosen[-1])
    return sorted(chosen)


def _least_alike(rows: Sequence[int], others: Sequence[int], vectors: NDArray[np.float32]) -> int:
    """Return the row least similar to its nearest other row, or on average if ``others`` include all rows."""
    likeness = vectors[list(rows)] @ vectors[list(others)].T
    score = likeness.mean(axis=1) if set(rows) <= set(others) else likeness.max(axis=1)
    return int(rows[int(score.argmin())])


def token_runs(
    rows: Sequence[Sequence[int]], preprocessing: TextPreprocessing
) -> tuple[Mapping[str, NDArray[Any]], ...]:
    """Make the text tower's inputs for token rows: all but the last in one run, the last in another."""
    parts = [list(range(len(rows) - 1)), [len(rows) - 1]] if len(rows) > 1 else [list(range(len(rows)))]
    batches = [padded_batch(rows, part, pad_id=preprocessing.pad_id) for part in parts if part]
    return tuple(inputs_of_batch(batch, preprocessing.graph_inputs) for batch in batches)
