"""The graph for CUDA: fused, free of shapes, equal to the exported one, and exact about odd masks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from precision_models import TOWERS, batches_of, cosines, graph_of, tower_id, vectors
from sample_models import Exported
from torch import nn

from export.graphs.cuda_form import suit_cuda
from export.graphs.early_pooling import pool_early
from export.graphs.fused_activations import fuse_activations
from export.graphs.fused_attention import Projections
from export.graphs.fused_norms import CONTRIB
from export.precision.cuda import cuda_from_onnx
from export.precision.simulation import simulated_from_onnx
from runtime.errors import ExportError
from runtime.manifest import Modality, Precision

LEAST_COSINE = {Precision.FP16: 0.9999, Precision.BF16: 0.99}


def outputs(graph: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_the_fused_graph_equals_the_exported_one(
    name: str, modality: Modality, exported: Exported, tmp_path: Path
) -> None:
    source, target = graph_of(exported(name), modality), tmp_path / "model.onnx"
    cuda_from_onnx(source, target, data_name="w", precision=Precision.FP32)
    batches = batches_of(exported(name), modality)
    np.testing.assert_allclose(vectors(target, batches), vectors(source, batches), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_one_product_for_query_key_and_value_gives_the_same(
    name: str, modality: Modality, exported: Exported, tmp_path: Path
) -> None:
    source, target = graph_of(exported(name), modality), tmp_path / "model.onnx"
    cuda_from_onnx(source, target, data_name="w", precision=Precision.FP32, projections=Projections.JOINED)
    batches = batches_of(exported(name), modality)[-2:]
    np.testing.assert_allclose(vectors(target, batches), vectors(source, batches), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_every_layer_is_fused_and_no_shape_is_read(name: str, modality: Modality, exported: Exported) -> None:
    model = onnx_ir.load(graph_of(exported(name), modality))
    n_attentions = sum(node.op_type == "Softmax" for node in model.graph)
    report = suit_cuda(model)
    kinds = Counter((node.domain, node.op_type) for node in model.graph)
    assert report.fused["attentions"] == n_attentions == kinds[CONTRIB, "MultiHeadAttention"]
    assert report.n_nodes == len(model.graph) <= 0.7 * report.n_nodes_before
    left = {op for _, op in kinds}
    assert not left & {"Shape", "Expand", "Conv", "Softmax", "Erf", "Tanh", "Relu", "ReduceL2"}


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_rounding_to_16_bits_keeps_the_vectors(
    name: str, modality: Modality, precision: Precision, exported: Exported, tmp_path: Path
) -> None:
    source, target = graph_of(exported(name), modality), tmp_path / "model.onnx"
    batches = batches_of(exported(name), modality)
    report = cuda_from_onnx(source, target, data_name="w", precision=precision, batches=lambda: batches)
    assert report.half is not None
    assert report.half.half_share == 1.0, report.half.kept_products
    simulated = tmp_path / "simulated.onnx"
    assert simulated_from_onnx(target, simulated, data_name="s") > 20
    cosine = cosines(vectors(simulated, batches), vectors(source, batches))
    assert cosine.min() >= LEAST_COSINE[precision]
    assert cosine.min() < 1 - 1e-8, "nothing was rounded"


def test_a_mask_with_holes_never_gets_a_plausible_vector(exported: Exported, tmp_path: Path) -> None:
    source, target = graph_of(exported("nllb-clip"), Modality.TEXT), tmp_path / "model.onnx"
    cuda_from_onnx(source, target, data_name="w", precision=Precision.FP32)
    ids = np.arange(5, 35).reshape(3, 10)
    mask = np.ones_like(ids)
    mask[0, 7:] = mask[2, 6:] = 0
    mask[1, 4] = 0
    expected, found = (
        outputs(graph, {"input_ids": ids, "attention_mask": mask})[0] for graph in (source, target)
    )
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-6)
    mask[1] = [0, 0, *[1] * 8]  # padded on the left
    assert np.isnan(outputs(target, {"input_ids": ids, "attention_mask": mask})[0][1]).all()


class Layer(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.activation, self.down = nn.Linear(16, 32), activation, nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


class QuickGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("activation", "fused"),
    [
        (nn.GELU(), {(CONTRIB, "BiasGelu"): 1}),
        (nn.GELU(approximate="tanh"), {(CONTRIB, "FastGelu"): 1}),
        (QuickGelu(), {(CONTRIB, "QuickGelu"): 1}),
        (nn.ReLU(), {("", "Max"): 1}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_activations_as_torch_exports_them_are_fused(
    activation: nn.Module, fused: dict[tuple[str, str], int], tmp_path: Path
) -> None:
    x = torch.randn(2, 3, 16) * 4
    program = torch.onnx.export(
        Layer(activation).eval(), (x,), dynamo=True, opset_version=18, input_names=["x"], verbose=False
    )
    assert program is not None
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    onnx_ir.save(program.model, source)
    model = onnx_ir.load(source)
    model.opset_imports[CONTRIB] = 1
    assert fuse_activations(model) == 1
    kinds = Counter((node.domain, node.op_type) for node in model.graph)
    assert fused.items() <= kinds.items()
    onnx_ir.save(model, target)
    one, other = (outputs(graph, {"x": x.numpy()})[0] for graph in (source, target))
    np.testing.assert_allclose(other, one, rtol=0, atol=2e-6)


class Residual(nn.Module):
    """Two layers on a residual stream, of which the first token is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(nn.GELU()) for _ in range(2)])
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + x.mean(dim=1, keepdim=True)  # every token reads all tokens
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)[:, 0]


def test_only_the_pooled_token_is_computed_after_the_last_mixing(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    program = torch.onnx.export(
        Residual().eval(), (x,), dynamo=True, opset_version=18, input_names=["x"], verbose=False
    )
    assert program is not None
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    onnx_ir.save(program.model, source)
    model = onnx_ir.load(source)
    n_before = len(model.graph)
    assert pool_early(model) > 10
    assert len(model.graph) == n_before, "no node is computed twice"
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert [len(node.outputs[0].shape or ()) for node in products] == [2] * 4
    onnx_ir.save(model, target)
    one, other = (outputs(graph, {"x": x.numpy()})[0] for graph in (source, target))
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-6)


def test_a_graph_that_needs_the_processor_is_refused(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])
    softmax = onnx.helper.make_node("Softmax", ["x"], ["y"])
    graph = onnx.helper.make_graph([softmax], "odd", [x], [y])
    path = tmp_path / "odd.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
    with pytest.raises(ExportError, match="keeps {'Softmax': 1} when fused for CUDA"):
        suit_cuda(onnx_ir.load(path))


def test_precisions_without_a_form_are_refused(exported: Exported, tmp_path: Path) -> None:
    source: Any = graph_of(exported("nllb-clip"), Modality.IMAGE)
    with pytest.raises(ExportError, match="no form in int8; expected fp32, fp16 or bf16"):
        cuda_from_onnx(source, tmp_path / "m.onnx", data_name="w", precision=Precision.INT8)
    with pytest.raises(ExportError, match="needs a calibration set"):
        cuda_from_onnx(source, tmp_path / "m.onnx", data_name="w", precision=Precision.FP16)
