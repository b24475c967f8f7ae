"""FP8 graphs: attention's products are quantized where TensorRT fuses them, and what that costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from precision_models import cosines
from tensorrt_double import session_of

from export.precision.activation_ranges import activation_ranges
from export.precision.fp8 import Fp8Report, fp8_from_onnx
from export.tensorrt.engine import engine_from_onnx
from export.tensorrt.kernels import expected_types
from export.tensorrt.options import EngineOptions
from runtime.backends.plans import Compiler, Extent, Profile

ADA = EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability="8.9")
BATCH = {"batch": Extent(1, 8, 32)}
DYNAMIC = "sequence"
N_HEADS, N_TOKENS = 4, 64


def attention(path: Path, head: int, length: str | int = N_TOKENS, *, one_query: bool = False) -> Path:
    """x (batch, length, width) → attention with a mask (batch, 1, 1, length) → a linear layer → y."""
    width, random = N_HEADS * head, np.random.default_rng(0)
    weights = {
        name: (random.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
        for name in ("wq", "wk", "wv", "wo")
    }
    shapes = {
        "split": np.array([0, 0, N_HEADS, head]),
        "join": np.array([0, 0, width]),
        "starts": np.array([0]),
        "ends": np.array([1]),
        "axes": np.array([2]),
    }
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}1"], name=f"{name}/MatMul"),
            helper.make_node("Reshape", [f"{name}1", "split"], [f"{name}2"], name=f"{name}/Reshape"),
            helper.make_node(
                "Transpose",
                [f"{name}2"],
                [f"{name}3"],
                name=f"{name}/Transpose",
                perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3],
            ),
        ]
    if one_query:
        nodes.append(helper.make_node("Slice", ["q3", "starts", "ends", "axes"], ["q4"], name="q/Slice"))
    nodes += [
        helper.make_node("MatMul", ["q4" if one_query else "q3", "k3"], ["scores"], name="scores/MatMul"),
        helper.make_node("Add", ["scores", "mask"], ["masked"], name="masked/Add"),
        helper.make_node("Softmax", ["masked"], ["shares"], name="shares/Softmax"),
        helper.make_node("MatMul", ["shares", "v3"], ["mixed"], name="mixed/MatMul"),
        helper.make_node("Transpose", ["mixed"], ["moved"], name="moved/Transpose", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["moved", "join"], ["joined"], name="joined/Reshape"),
        helper.make_node("MatMul", ["joined", "wo"], ["y"], name="out/MatMul"),
    ]
    n_queries = 1 if one_query else length
    dims = {
        **{f"{name}1": ["batch", length, width] for name in "qkv"},
        **{f"{name}2": ["batch", length, N_HEADS, head] for name in "qkv"},
        "q3": ["batch", N_HEADS, length, head],
        "v3": ["batch", N_HEADS, length, head],
        "k3": ["batch", N_HEADS, head, length],
        "scores": ["batch", N_HEADS, n_queries, length],
        "masked": ["batch", N_HEADS, n_queries, length],
        "shares": ["batch", N_HEADS, n_queries, length],
        "mixed": ["batch", N_HEADS, n_queries, head],
        "moved": ["batch", n_queries, N_HEADS, head],
        "joined": ["batch", n_queries, width],
        **({"q4": ["batch", N_HEADS, 1, head]} if one_query else {}),
    }
    graph = helper.make_graph(
        nodes,
        "attention",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", length, width]),
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1, 1, length]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", n_queries, width])],
        [numpy_helper.from_array(array, name) for name, array in {**weights, **shapes}.items()],
        value_info=[helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in dims.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def rows(head: int, length: str | int = N_TOKENS) -> dict[str, np.ndarray]:
    random, n = np.random.default_rng(1), length if isinstance(length, int) else N_TOKENS
    mask = np.zeros((4, 1, 1, n), np.float32)
    mask[1:, ..., 12:] = -30_000
    return {"x": random.standard_normal((4, n, N_HEADS * head)).astype(np.float32), "mask": mask}


def converted(source: Path, target: Path, head: int, length: str | int = N_TOKENS) -> Fp8Report:
    ranges = activation_ranges(source, [rows(head, length)], threads=1)
    return fp8_from_onnx(source, target, data_name="w", ranges=ranges)


@pytest.mark.parametrize(
    ("head", "length", "one_query", "dtype"),
    [
        (64, N_TOKENS, False, "FP8"),
        (32, N_TOKENS, False, "FP8"),
        (64, DYNAMIC, False, "Half"),
        (16, N_TOKENS, False, "Half"),
        (64, 16, False, "Half"),
        (80, N_TOKENS, False, "Half"),
        (64, N_TOKENS, True, "Half"),
    ],
)
def test_attention_is_quantized_where_a_kernel_fuses_it(
    head: int, length: str | int, one_query: bool, dtype: str, tmp_path: Path
) -> None:
    source = attention(tmp_path / "source.onnx", head, length, one_query=one_query)
    report = converted(source, tmp_path / "fp8.onnx", head, length)
    types = expected_types(onnx_ir.load(tmp_path / "fp8.onnx"))
    assert types.pop("scores/MatMul") == types.pop("mixed/MatMul") == dtype
    assert set(types.values()) == {"FP8"}
    assert report.n_fp8 == (6 if dtype == "FP8" else 4)
    assert (report.share_fp8 == 1.0) == (dtype == "FP8")


def cosines_of(length: str | int, tmp_path: Path) -> np.ndarray:
    source, target = attention(tmp_path / "source.onnx", 64, length), tmp_path / "fp8.onnx"
    converted(source, target, 64)
    found, expected = (session_of(graph).run(None, rows(64))[0] for graph in (target, source))
    return cosines(found.reshape(-1, found.shape[-1]), expected.reshape(-1, found.shape[-1]))


def test_attention_in_fp8_costs_little_more_than_linear_layers_do(tmp_path: Path) -> None:
    """E4M3 has 3 bits of mantissa; random weights and rows leave no structure to rely on."""
    linear_alone, all_products = cosines_of(DYNAMIC, tmp_path), cosines_of(N_TOKENS, tmp_path)
    assert linear_alone.mean() > 0.99
    assert all_products.mean() > linear_alone.mean() - 0.01


@pytest.mark.parametrize(
    ("head", "length", "products"),
    [
        (64, N_TOKENS, {"FP8": 6}),
        (64, DYNAMIC, {"FP8": 4, "Half": 2}),
        (16, N_TOKENS, {"FP8": 4, "Half": 2}),
    ],
)
def test_attention_with_a_mask_is_one_kernel(
    head: int, length: str | int, products: dict[str, int], tmp_path: Path
) -> None:
    """Built ahead of time for Ada, not executed."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, the compiler that needs no GPU")
    source = attention(tmp_path / "source.onnx", head, length)
    converted(source, tmp_path / "fp8.onnx", head)
    dims = {**BATCH, DYNAMIC: Extent(1, 16, 77)} if length == DYNAMIC else BATCH
    kernels = engine_from_onnx(
        tmp_path / "fp8.onnx", tmp_path / "model.plan", profiles=[Profile(dims)], options=ADA
    ).kernels
    assert (kernels.products, kernels.n_fused_attention, kernels.unseen) == (products, 1, ())
