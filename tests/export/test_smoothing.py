"""Smoothing changes no output, and takes outlier channels out of activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from precision_models import TOWERS, batches_of, graph_of, tower_id, vectors
from sample_models import Exported

from export.graphs.edits import constant
from export.precision.clipping import channel_magnitudes
from export.precision.smoothing import smooth
from runtime.errors import ExportError
from runtime.manifest import Modality


@pytest.mark.parametrize("alpha", [0.3, 0.7])
@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_smoothing_is_exact(
    name: str, modality: Modality, alpha: float, exported: Exported, tmp_path: Path
) -> None:
    source, batches = graph_of(exported(name), modality), batches_of(exported(name), modality)
    model = onnx_ir.load(source)
    assert smooth(model, source.parent, batches, alpha=alpha) >= 1
    onnx_ir.save(model, tmp_path / "smooth.onnx")
    assert np.abs(vectors(tmp_path / "smooth.onnx", batches) - vectors(source, batches)).max() <= 1e-5


def test_outlier_channels_shrink(exported: Exported) -> None:
    model = exported("nllb-clip")
    source, batches = graph_of(model, Modality.IMAGE), batches_of(model, Modality.IMAGE)
    graph = onnx_ir.load(source)
    norm = next(node for node in graph.graph if node.op_type == "LayerNormalization" and "ln_1" in node.name)
    weight = constant(norm.inputs[1]).copy()
    weight[0] *= 50
    norm.inputs[1].const_value = onnx_ir.tensor(weight, name=norm.inputs[1].name)
    name = norm.outputs[0].name
    before = channel_magnitudes(graph, source.parent, [name], batches)[name]
    smooth(graph, source.parent, batches, alpha=0.5)
    after = channel_magnitudes(graph, source.parent, [name], batches)[name]
    assert after.max() / np.median(after) < 0.5 * before.max() / np.median(before)


def test_values_that_are_also_the_residual_stay(exported: Exported) -> None:
    model = exported("altclip")
    source, batches = graph_of(model, Modality.TEXT), batches_of(model, Modality.TEXT)
    graph = onnx_ir.load(source)
    before = {
        node.name: constant(node.inputs[1])
        for node in graph.graph
        if node.op_type == "LayerNormalization" and "blocks" in node.name
    }
    smooth(graph, source.parent, batches, alpha=0.5)
    for node in graph.graph:
        if node.name in before:
            assert np.array_equal(constant(node.inputs[1]), before[node.name])


def test_alpha_is_checked(exported: Exported) -> None:
    source = graph_of(exported("nllb-clip"), Modality.TEXT)
    with pytest.raises(ExportError, match="between 0 and 1"):
        smooth(onnx_ir.load(source), source.parent, [], alpha=-0.1)
