"""Export a tower to ONNX with dynamic batch and sequence, pinned opset and IR version, and metadata."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from export.towers import ImageTowerModule, TextTowerModule, Towers, output_name
from runtime.errors import ExportError
from runtime.manifest import Modality

__all__ = ["EXTERNAL_DATA_OVER_BYTES", "IR_VERSION", "OPSET", "input_names", "onnx_from_tower"]

OPSET = 18
"""Newest opset that every engine handles well; 23 adds an Attention operator that some do not support."""

IR_VERSION = 10
"""IR version supported since ONNX Runtime 1.19 (Triton 24.10)."""

EXTERNAL_DATA_OVER_BYTES = 64 << 20
"""Size above which weights go to an external file, which ONNX Runtime memory-maps: 0.5 s and 0.6 GB to
open instead of 4 s and 2 GB."""


def onnx_from_tower(
    towers: Towers, modality: Modality, path: Path, *, data_name: str, metadata: Mapping[str, str]
) -> None:
    """Write a tower's graph to ``path``; large weights go to the external data file ``data_name``.

    Inputs: ``input_ids`` and, unless padding is not masked, ``attention_mask``, int64 (batch, sequence) or
    (batch, context length) for texts of a fixed length; or ``pixels`` uint8 (batch, 3, height, width).
    Outputs: ``vector`` float32 (batch, dim), then ``vector_R`` per MRL head.

    Raises:
        ExportError: torch's exporter failed, or made a dynamic dimension static.
    """
    tower = towers.tower(modality)
    arguments, shapes = _example(towers, modality)
    names = [output_name(dim, towers.dim) for dim in towers.dims]
    try:
        with _quiet():
            program = torch.onnx.export(
                tower,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(input_names(towers, modality)),
                output_names=names,
                dynamic_shapes=shapes,
                optimize=True,
            )
    except Exception as error:  # torch.export's exceptions have no common base class
        raise ExportError(
            f"torch could not export the {modality.value} tower of {towers.architecture}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if program is None:
        raise ExportError(f"torch.onnx.export returned no program for the {modality.value} tower.")
    model = program.model
    _settle(model, towers, modality, metadata)
    large = _weight_bytes(tower) > EXTERNAL_DATA_OVER_BYTES
    onnx_ir.save(model, path, external_data=data_name if large else None, size_threshold_bytes=1024)


def input_names(towers: Towers, modality: Modality) -> tuple[str, ...]:
    """Return the names of a tower's inputs, in order."""
    return towers.text_preprocessing.graph_inputs if modality is Modality.TEXT else ("pixels",)


def _example(
    towers: Towers, modality: Modality
) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, object], ...]]:
    batch = torch.export.Dim("batch", min=1)
    if modality is Modality.IMAGE:
        size = towers.image_preprocessing
        pixels = torch.randint(0, 256, (3, 3, size.height, size.width), dtype=torch.uint8)
        return (pixels,), ({0: batch},)
    text = towers.text_preprocessing
    axes: dict[int, object] = {0: batch}
    if not text.fixed_length:
        axes[1] = torch.export.Dim("sequence", min=1, max=text.context_length)
    length = text.context_length if text.fixed_length else min(11, text.context_length)
    ids = torch.full((3, length), text.suffix_ids[-1])
    ids[1:, 7:] = text.pad_id
    arguments = (ids, (ids != text.pad_id).long())[: len(text.graph_inputs)]
    return arguments, tuple(dict(axes) for _ in arguments)


def _settle(model: onnx_ir.Model, towers: Towers, modality: Modality, metadata: Mapping[str, str]) -> None:
    """Pin versions, clear tracing metadata, name nodes and dimensions; check that the batch is dynamic."""
    RemoveUnusedOpsetsPass()(model)
    found = model.opset_imports.get("", 0)
    if found != OPSET or len(model.opset_imports) != 1:
        raise ExportError(f"The exporter wrote opsets {dict(model.opset_imports)}; expected only {OPSET}.")
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "babeltower", metadata["babeltower.version"]
    model.graph.name = f"{metadata['babeltower.name']}_{modality.value}"
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    _name_nodes(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None or isinstance(value.shape[0], int):
            raise ExportError(f"{value.name} has shape {value.shape}; its batch dimension must be dynamic.")
    for value, dim in zip(model.graph.outputs, towers.dims, strict=True):
        value.shape = onnx_ir.Shape(["batch", dim])
        value.dtype = onnx_ir.DataType.FLOAT


def _name_nodes(model: onnx_ir.Model) -> None:
    """Name each node after its module (``encoder.blocks.3.attention.query/MatMul``); drop stack traces."""
    taken: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((scope for scope in reversed(scopes[:-1]) if not scope.startswith("_")), "")
        name = f"{module or 'tower'}/{node.op_type}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        node.metadata_props.clear()
        node.doc_string = None


def _weight_bytes(tower: TextTowerModule | ImageTowerModule) -> int:
    return sum(p.numel() * p.element_size() for p in (*tower.parameters(), *tower.buffers()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress output and deprecation warnings; its errors are still raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
