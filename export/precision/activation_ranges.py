"""Measure the largest magnitude of each activation, since FP16 overflows above 65,504."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime.errors import ExportError

__all__ = ["activation_ranges"]

_PREFIX = "largest magnitude of "


def activation_ranges(
    graph: Path, batches: Sequence[Mapping[str, NDArray[Any]]], *, threads: int | None = None
) -> dict[str, float]:
    """Measure the largest magnitude of each float tensor of an FP32 graph over the given batches.

    The maximum is computed inside the graph, so that only scalars are returned: memory use is that of one
    normal run, and external weights stay memory-mapped.

    Args:
        graph: FP32 ONNX file.
        batches: Inputs by name; real text and images, since outliers matter.
        threads: Threads per run; None uses all physical cores.

    Returns:
        Magnitude by tensor name, for all float inputs and node outputs.

    Raises:
        ExportError: there are no batches or no float activations, the graph does not run, or an activation
            is not finite.
    """
    if not batches:
        raise ExportError(f"No batches were given to measure the activations of {graph.name} on.")
    model = onnx.load(str(graph), load_external_data=False)
    names = _float_activations(model)
    if not names:
        raise ExportError(f"{graph} declares no float activations; export it with shapes and types.")
    _reduce_inside(model, names)
    largest = np.zeros(len(names))
    session = _session(model, graph.parent, threads)
    for batch in batches:
        found = np.array(session.run([_PREFIX + name for name in names], dict(batch)), dtype=np.float64)
        if not np.isfinite(found).all():
            raise ExportError(
                f"Activation {names[int(np.argmin(np.isfinite(found)))]!r} of {graph} is not finite in FP32: "
                "the checkpoint or the batches are broken."
            )
        np.maximum(largest, found, out=largest)
    return dict(zip(names, largest.tolist(), strict=True))


def _float_activations(model: onnx.ModelProto) -> list[str]:
    """Return the names of the float inputs and node outputs, in graph order."""
    stated = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    floats = {value.name for value in stated if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    produced = (output for node in model.graph.node for output in node.output)
    return [name for name in (*(value.name for value in model.graph.input), *produced) if name in floats]


def _reduce_inside(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Replace the graph outputs with one scalar maximum per tensor."""
    del model.graph.output[:]
    for name in names:
        absolute, largest = f"magnitude of {name}", _PREFIX + name
        model.graph.node.append(helper.make_node("Abs", [name], [absolute]))
        model.graph.node.append(helper.make_node("ReduceMax", [absolute], [largest], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))


def _session(model: onnx.ModelProto, folder: Path, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # With full fusion some tensors would be computed twice: inside the fused node, and to be measured.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise ExportError(f"ONNX Runtime cannot measure the graph in {folder}: {error}.") from error
