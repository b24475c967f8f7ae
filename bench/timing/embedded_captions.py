"""Captions embedded one by one by a model's text tower, and the memory that this takes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.timing.immich_queries import resident_bytes
from bench.timing.lean_process import called_alone
from runtime.manifest import Modality, Precision

__all__ = ["EmbeddedCaptions", "embedded_captions"]


@dataclass(frozen=True, slots=True)
class EmbeddedCaptions:
    """Vectors of captions, float32 (captions, dim), and memory of the process that embedded them.

    Attributes:
        before_bytes: Resident memory before the model was opened.
        resident_bytes: The same with the text tower open, after all captions.
    """

    vectors: NDArray[np.float32]
    before_bytes: int
    resident_bytes: int


def embedded_captions(
    model: Path, precision: Precision, captions: Sequence[tuple[str, str]]
) -> EmbeddedCaptions:
    """Embed (text, FLORES-200 code) one by one in a fresh process."""
    found = called_alone(__name__, _embed.__name__, str(model.resolve()), precision.value, list(captions))
    vectors = np.frombuffer(base64.b64decode(found.pop("vectors")), np.float32)
    return EmbeddedCaptions(vectors.reshape(len(captions), -1), **found)


def _embed(model: str, precision: str, captions: Sequence[tuple[str, str]]) -> dict[str, Any]:
    from runtime.local import LocalEncoder
    from runtime.machine import return_free_memory
    from runtime.opening.tower_check import Checks

    before_bytes = resident_bytes()
    with LocalEncoder.from_repository(model, precision=precision, threads=2, verify=Checks.NONE) as encoder:
        encoder.open_tower(Modality.TEXT)
        vectors = np.concatenate([encoder.embed_texts([text], [code]) for text, code in captions])
        return_free_memory()
        return {
            "vectors": base64.b64encode(vectors.tobytes()).decode(),
            "before_bytes": before_bytes,
            "resident_bytes": resident_bytes(),
        }
