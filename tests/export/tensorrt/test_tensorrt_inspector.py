"""The engine inspector's JSON, as the vendor publishes it for each major release.

Excerpts, shortened to the fields that are read:

- 10.x: NVIDIA/TensorRT, issue 4020 (a ResNet) and issue 4397 (a transformer layer); pytorch/TensorRT, the
  documentation of explicit typing (constants named ``*_dconst`` among the inputs).
- 11.x: "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x" in NVIDIA's documentation of 11.0
  and 11.3: ``Bindings`` became ``I/O Tensors``, and ``Format/DataType`` was split into ``Format`` and
  ``DataType``.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.tensorrt.kernels import kernels_from_inspection, summary_from_kernels
from runtime.errors import ExportError

PRODUCT = "/encoder/layers.0/pos_ff/output/MatMul"
TACTIC = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"
METADATA = f"[ONNX Layer: {PRODUCT}]\x1f[ONNX Layer: /encoder/layers.0/pos_ff/output/Add]"


def listing(tensors: dict[str, dict[str, Any]], **changes: Any) -> str:
    """One kernel, as issue 4397 lists it, with a release's fields of a tensor."""
    kernel = {
        "Name": "/encoder/layers_0/pos_ff/output/MatMul_myl0_7",
        "LayerType": "gemm",
        "Inputs": [
            {"Name": "/encoder/layers_0/pos_ff/output/Add_output_0'.1_11", "Dimensions": [1, 40, 1024]}
        ],
        "Outputs": [{"Name": "__myln_k_arg__bb1_12", "Dimensions": [1, 40, 256]}],
        "TacticName": TACTIC,
        "StreamId": 0,
        "Metadata": METADATA,
        **changes,
    }
    kernel["Inputs"] = [{**tensor, **tensors["Inputs"]} for tensor in kernel["Inputs"]]
    kernel["Outputs"] = [{**tensor, **tensors["Outputs"]} for tensor in kernel["Outputs"]]
    return json.dumps({"Layers": [kernel, "a layer of which only the name is listed"], "Bindings": []})


def product(dtype: int = TensorProto.FLOAT16) -> onnx_ir.Model:
    weight = numpy_helper.from_array(np.eye(4).astype(helper.tensor_dtype_to_np_dtype(dtype)), "w")
    x, y = (helper.make_tensor_value_info(name, dtype, ["batch", 4]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name=PRODUCT)]
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx_ir.serde.deserialize_model(model)


def both(**fields: str) -> dict[str, dict[str, Any]]:
    return {"Inputs": fields, "Outputs": fields}


@pytest.mark.parametrize(
    "tensors",
    [
        both(**{"Format/Datatype": "Half"}),
        both(**{"Format/Datatype": "Row major linear FP16 format"}),
        both(**{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}),
        both(Datatype="Half"),
        both(Format="Row major linear FP16 format (kLINEAR)", DataType="Half"),
        both(Format="Row major linear FP16 format (kLINEAR)", DataType="FP16"),
    ],
    ids=["10", "10-with-context", "10-vectorized", "rtx", "11", "11-fp16"],
)
def test_the_type_of_a_product_is_read_in_every_release(tensors: dict[str, dict[str, Any]]) -> None:
    (kernel,) = kernels_from_inspection(listing(tensors))
    assert (kernel.inputs, kernel.outputs, kernel.tactic) == (("Half",), ("Half",), TACTIC)
    summary = summary_from_kernels(product(), [kernel])
    assert (summary.products, summary.unseen) == ({"Half": 1}, ())


@pytest.mark.parametrize("name", ["Format/Datatype", "DataType"])
def test_a_product_in_another_type_is_refused_in_every_release(name: str) -> None:
    kernels = kernels_from_inspection(listing(both(**{name: "Float"})))
    with pytest.raises(ExportError, match=r"should compute in Half, .*takes \['Float'\]"):
        summary_from_kernels(product(), kernels)


def test_constants_among_the_inputs_are_not_operands() -> None:
    """A scale in FP32 is none, and must not make an FP16 product look like an FP32 one."""
    scale = {"Name": "__mye131_dconst", "Dimensions": [], "Format/Datatype": "Float"}
    text = json.loads(listing(both(**{"Format/Datatype": "Half"})))
    text["Layers"][0]["Inputs"].append(scale)
    (kernel,) = kernels_from_inspection(json.dumps(text))
    assert kernel.inputs == ("Half",)
    assert summary_from_kernels(product(), [kernel]).products == {"Half": 1}


@pytest.mark.parametrize(
    ("name", "kind", "multiplies"),
    [
        ("/MatMul_myl0_7", "gemm", True),
        ("__myl_FcMulAdd_myl0_25", "kgen", True),
        ("__myl_CorrMulAddRelu_myl0_1", "kgen", True),
        ("_gemm_mha_v2_myl0_4", "kgen", True),
        ("resnetv15_conv0_fwd + resnetv15_relu0_fwd", "CaskConvActPool", True),
        ("__myl_AddCastMeanSubMulMeanAddSqrtDivMulCastMulAdd_myl0_8", "kgen", False),
        ("Reformatting CopyNode for Input Tensor 0", "Reformat", False),
    ],
)
def test_kernels_that_multiply_are_known_by_their_names(name: str, kind: str, multiplies: bool) -> None:
    text = listing(both(**{"Format/Datatype": "Half"}), Name=name, LayerType=kind)
    assert [kernel.multiplies for kernel in kernels_from_inspection(text)] == [multiplies]


@pytest.mark.parametrize(
    ("tactic", "n"),
    [
        (TACTIC, 1),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize64x128x32_stage5_warpsize2x2x1_tensor16x8x16", 0),
        ("", 0),
    ],
)
def test_products_that_sum_in_fp16_are_counted(tactic: str, n: int) -> None:
    text = listing(both(**{"Format/Datatype": "Half"}), TacticName=tactic)
    summary = summary_from_kernels(product(), kernels_from_inspection(text))
    assert summary.n_half_accumulators == n
    assert summary.tactics == ({tactic: 1} if tactic else {})


def test_a_type_that_is_not_known_is_named() -> None:
    text = listing(both(**{"Format/Datatype": "N/A due to dynamic shapes"}))
    with pytest.raises(ExportError, match="N/A due to dynamic shapes"):
        summary_from_kernels(product(), kernels_from_inspection(text))


def test_bf16_is_read() -> None:
    kernels = kernels_from_inspection(listing(both(DataType="BFloat16")))
    assert summary_from_kernels(product(TensorProto.BFLOAT16), kernels).products == {"BFloat16": 1}
