"""Full-size graphs with random weights in every precision, written once into a work folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from runtime.backends import require_computes
from runtime.errors import EngineError
from runtime.manifest import Engine, Modality, Precision

if TYPE_CHECKING:
    from export.towers import Towers

__all__ = ["Artefact", "artefacts_of", "calibration_batches", "fp32_graph", "random_inputs", "torch_towers"]

_N_TOKENS_KNOWN = 1_000
_PAD_ID = 1


@dataclass(frozen=True, slots=True)
class Artefact:
    """Graph, with the engine and precision that run it."""

    engine: Engine
    precision: Precision
    graph: Path
    data: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the graph and its weights."""
        return (self.graph, self.data) if self.data.is_file() else (self.graph,)


def artefacts_of(variant: str, modality: Modality, work: Path) -> dict[str, Artefact]:
    """Write the missing forms of a tower, and return all by name, ``engine precision``.

    Forms that are not correct on this processor are left out.
    """
    fp32 = fp32_graph(variant, modality, work)
    folder = fp32.parent
    forms = {}
    for engine, precision, stem, suffix in (
        (Engine.ONNXRUNTIME, Precision.FP32, "fp32", "onnx"),
        (Engine.OPENVINO, Precision.FP32, "fp32", "onnx"),
        (Engine.OPENVINO, Precision.BF16, "bf16", "onnx"),
        (Engine.ONNXRUNTIME, Precision.INT8, "int8_onnxruntime", "onnx"),
        (Engine.OPENVINO, Precision.INT8, "int8_openvino", "onnx"),
    ):
        if not _computes(engine, precision):
            continue
        graph = folder / f"{stem}.{suffix}"
        if not graph.is_file():
            _convert(fp32, graph, engine, precision)
        forms[f"{engine.value} {precision.value}"] = Artefact(
            engine, precision, graph, graph.with_suffix(".data")
        )
    if not _computes(Engine.OPENVINO, Precision.INT8):
        return forms
    nncf = folder / "nncf.xml"
    if not nncf.is_file():
        _quantize_with_nncf(fp32, nncf)
    forms["openvino int8 by NNCF"] = Artefact(Engine.OPENVINO, Precision.INT8, nncf, nncf.with_suffix(".bin"))
    return forms


def _computes(engine: Engine, precision: Precision) -> bool:
    try:
        require_computes(engine, precision)
    except EngineError:
        return False
    return True


def fp32_graph(variant: str, modality: Modality, work: Path) -> Path:
    """Return a tower's FP32 graph, exporting it if it is missing."""
    graph = work / f"{variant}_{modality.value}" / "fp32.onnx"
    if not graph.is_file():
        _export(variant, modality, work, graph)
    return graph


def torch_towers(variant: str, work: Path) -> Towers:
    """Read a variant's checkpoint of random weights; it is made where it is missing."""
    from bench.models.full_size import checkpoint_from_variant
    from export.checkpoint import towers_from_checkpoint

    checkpoint = work / "checkpoints" / variant
    if not checkpoint.is_dir():
        checkpoint_from_variant(variant, checkpoint)
    return towers_from_checkpoint(checkpoint)


def random_inputs(graph: Path, *, n_rows: int, n_tokens: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return random inputs of a tower's graph; the last text ends in padding."""
    random = np.random.default_rng(seed)
    first = onnx_ir.load(graph).graph.inputs[0]
    if first.name == "pixels":
        assert first.shape is not None
        shape = [n_rows, *(int(str(side)) for side in first.shape[1:])]
        return {"pixels": random.integers(0, 256, shape, dtype=np.uint8)}
    ids = random.integers(3, _N_TOKENS_KNOWN, (n_rows, n_tokens))
    if n_rows > 1:
        ids[-1, n_tokens // 2 :] = _PAD_ID
    return {"input_ids": ids, "attention_mask": (ids != _PAD_ID).astype(np.int64)}


def calibration_batches(graph: Path) -> Sequence[dict[str, NDArray[Any]]]:
    """Return a few batches of random inputs, enough for speed and form but not for accuracy."""
    return [random_inputs(graph, n_rows=4, n_tokens=16, seed=seed) for seed in (1, 2, 3)]


def _export(variant: str, modality: Modality, work: Path, graph: Path) -> None:
    from export.onnx_graph import onnx_from_tower

    graph.parent.mkdir(parents=True, exist_ok=True)
    facts = {"babeltower.version": "0", "babeltower.name": variant}
    towers = torch_towers(variant, work)
    onnx_from_tower(towers, modality, graph, data_name=f"{graph.stem}.data", metadata=facts)


def _convert(fp32: Path, graph: Path, engine: Engine, precision: Precision) -> None:
    from export.precision.bf16 import bf16_from_onnx
    from export.precision.int8 import GraphTarget, int8_from_onnx, recipe_for

    data_name = f"{graph.stem}.data"
    if precision is Precision.BF16:
        bf16_from_onnx(fp32, graph, data_name=data_name)
        return
    recipe = recipe_for(GraphTarget(engine.value))
    int8_from_onnx(fp32, graph, data_name=data_name, calibration=calibration_batches(fp32), recipe=recipe)


def _quantize_with_nncf(fp32: Path, target: Path) -> None:
    """Quantize the same graph on the same batches with NNCF's recipe for transformers.

    OpenVINO refuses the model if a factor follows the token table, so the factor is moved into the table
    first.
    """
    import nncf
    import openvino

    from export.graphs.edits import drop_unused
    from export.graphs.embedding_table import EmbeddingTable, shrink_table

    source = fp32.with_name("before_nncf.onnx")
    model = onnx_ir.load(fp32)
    shrink_table(model, EmbeddingTable.FP32)
    drop_unused(model)
    onnx_ir.save(model, source, external_data=f"{source.stem}.data", size_threshold_bytes=1024)
    batches = list(calibration_batches(fp32))
    dataset = nncf.Dataset(batches)
    quantized = nncf.quantize(
        openvino.Core().read_model(str(source)),
        dataset,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )
    openvino.save_model(quantized, target, compress_to_fp16=False)
    for file in (source, source.with_suffix(".data")):
        file.unlink(missing_ok=True)
