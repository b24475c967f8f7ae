"""What the tests of precisions share: a sample's graphs, real inputs for them, and how vectors compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from sample_models import NAMES

from export.parity.probes import probe_images, probe_texts
from runtime.cosines import row_cosines
from runtime.manifest import Manifest, Modality, Precision
from runtime.preprocessing.batching import batches_from_rows
from runtime.preprocessing.image import pixels_from_image
from runtime.preprocessing.text import Tokenizer, texts_with_languages

Batch = Mapping[str, NDArray[Any]]
TOWERS = [(name, modality) for name in NAMES for modality in Modality]


def tower_id(tower: object) -> str:
    """What pytest calls a tower."""
    return tower.value if isinstance(tower, Modality) else str(tower)


def graph_of(model: Path, modality: Modality) -> Path:
    """The FP32 graph of REPOSITORY/NAME."""
    tower = Manifest.read(model).variant(Precision.FP32).tower(modality)
    return model.parent / tower.model / str(tower.version) / tower.graph


def batches_of(model: Path, modality: Modality, *, texts_per_language: int = 1) -> list[Batch]:
    """Real names in every language and awkward texts, or images of every kind."""
    manifest = Manifest.read(model)
    if modality is Modality.IMAGE:
        return [{"pixels": np.stack([pixels_from_image(i, manifest.image) for i in probe_images()])}]
    tokenizer = Tokenizer(model.parent / manifest.variant(Precision.FP32).tokenizer, manifest.text)
    probes = probe_texts(manifest.text, per_language=texts_per_language)
    rows = tokenizer.rows_from_texts(
        list(texts_with_languages([p.text for p in probes], [p.language for p in probes]))
    )
    batches = batches_from_rows([row.ids for row in rows], pad_id=manifest.text.pad_id, max_batch_tokens=1024)
    return [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches]


def vectors(graph: Path, batches: Sequence[Batch], *, exact: bool = True) -> NDArray[np.float32]:
    """First output of a graph on one thread of ONNX Runtime, all batches together.

    Args:
        exact: Sum 8-bit products in 32 bits on every CPU, as VNNI does; otherwise as this CPU is served.
    """
    options = onnxruntime.SessionOptions()
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    name = session.get_outputs()[0].name
    return np.concatenate([session.run([name], dict(batch))[0] for batch in batches])


def cosines(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each row with its counterpart."""
    return row_cosines(found, expected)
