"""What Triton's own C++ backends accept in a ``config.pbtxt``, from their sources.

Read at these commits (the main branches of 2026, which Triton 26.06 and later are built from):

- triton-inference-server/onnxruntime_backend 00fd3e87, ``src/onnxruntime.cc``: ``ModelState::ModelState``
  (threads, execution mode, memory), ``ModelState::LoadModel`` (providers), ``ValidateInputs``.
- triton-inference-server/openvino_backend db193042, ``src/openvino.cc``: ``ModelState::ParseParameters``,
  ``ParseParameterHelper``, ``ValidateInputs``, ``ModelInstanceState::ProcessRequests``.
- triton-inference-server/tensorrt_backend e2ef6d79, ``src/model_state.cc``: ``ParseParameters``;
  ``src/instance_state.cc``: ``InitializeGraphSpecs``, ``ValidateGraphSpec``, ``SetCudaGraphShape``.

A backend ignores a parameter whose key it does not know; so a misspelt one would do nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

WHOLE, BOOL = r"\d+", r"(?i:true|on|1|false|off|0)"
PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "onnxruntime": {
        "execution_mode": "[01]",
        "intra_op_thread_count": WHOLE,
        "inter_op_thread_count": WHOLE,
        "session.use_device_allocator_for_initializers": "[01]",
        "enable_mem_arena": BOOL,
        "enable_mem_pattern": BOOL,
        "cudnn_conv_algo_search": "[012]",
        "arena_extend_strategy": "[01]",
        "gpu_mem_limit": WHOLE,
        "do_copy_in_default_stream": "[01]",
    },
    "openvino": {
        "INFERENCE_NUM_THREADS": WHOLE,
        "COMPILATION_NUM_THREADS": WHOLE,
        "HINT_BF16": "(?i:yes)",
        "NUM_STREAMS": r"(?i:auto|numa)|\d+",
        "PERFORMANCE_HINT": "(?i:latency|throughput|cumulative_throughput)",
        "RESHAPE_IO_LAYERS": "(?i:yes|no)",
        "TARGET_DEVICE": "[A-Za-z.:,]+",
    },
    "tensorrt": {"execution_context_allocation_strategy": "STATIC|ON_PROFILE_CHANGE"},
}
"""Keys that each backend looks for, and the values that it lets pass."""

OVERWRITTEN = {
    "cudnn_conv_algo_search",
    "gpu_mem_limit",
    "arena_extend_strategy",
    "do_copy_in_default_stream",
}
"""Options of the CUDA provider that the backend takes from ``parameters``, or from its own defaults."""

PROVIDER = {"use_tf32": "[01]", "cudnn_conv_use_max_workspace": "[01]", "use_ep_level_unified_stream": "[01]"}
"""Options of the CUDA provider that the accelerator sets."""

ELEMENTS = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
}
SIZES = {"TYPE_INT64": 8, "TYPE_UINT8": 1}


def config_of_folder(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def require_accepted(folder: Path, *, graph: str = "model.onnx") -> Any:
    """Hold a tower's configuration to its graph and to what its backend accepts, with nothing completed."""
    config = config_of_folder(folder)
    assert config.name == folder.name
    assert (folder / "1" / config.default_model_filename).is_file()
    for key, value in config.parameters.items():
        if not key.startswith("babeltower_"):
            assert re.fullmatch(PARAMETERS[config.backend][key], value.string_value), (key, value)
    _require_tensors_of_graph(config, folder / "1" / graph)
    (group,) = config.instance_group
    gpu = config.backend == "tensorrt" or config.HasField("optimization")
    _require_batching(config, gpu=gpu)
    if gpu:
        _require_optimization(config)
    assert group.count >= 1
    assert group.kind == (model_config_pb2.ModelInstanceGroup.KIND_GPU if gpu else group.KIND_CPU)
    assert config.model_warmup
    for warmup in config.model_warmup:
        _require_warmup(config, warmup, folder)
    return config


def _require_tensors_of_graph(config: Any, path: Path) -> None:
    graph = onnx.load(path, load_external_data=False).graph
    for said, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in said] == [value.name for value in values]
        for tensor, value in zip(said, values, strict=True):
            kind = value.type.tensor_type
            assert model_config_pb2.DataType.Name(tensor.data_type) == ELEMENTS[kind.elem_type]
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
            assert dims[0] == -1
            assert list(tensor.dims) == (dims[1:] if config.max_batch_size else dims)


def _require_batching(config: Any, *, gpu: bool) -> None:
    """The openvino backend compiles a model that batches for its largest batch, and takes no other.

    Text towers' requests come batched on a CPU; Triton joins those of images, and all those on a GPU.
    """
    assert (config.max_batch_size > 1) is (config.backend != "openvino")
    takes_text = any(tensor.name == "input_ids" for tensor in config.input)
    joins = config.max_batch_size > 0 and (gpu or not takes_text)
    assert config.HasField("dynamic_batching") is joins
    preferred = list(config.dynamic_batching.preferred_batch_size)
    assert bool(preferred) is gpu
    assert preferred == sorted(set(preferred))
    assert not preferred or (preferred[0] >= 1 and preferred[-1] <= config.max_batch_size)


def _require_optimization(config: Any) -> None:
    """Pinned memory for every tensor; each backend's own block, and graphs of distinct shapes."""
    optimization = config.optimization
    assert optimization.input_pinned_memory.enable
    assert optimization.output_pinned_memory.enable
    accelerators = list(optimization.execution_accelerators.gpu_execution_accelerator)
    assert len(accelerators) == (config.backend == "onnxruntime")
    for accelerator in accelerators:
        assert accelerator.name == "cuda"
        assert not OVERWRITTEN & set(accelerator.parameters)
        for key, value in accelerator.parameters.items():
            assert re.fullmatch(PROVIDER[key], value), (key, value)
    specs = list(optimization.cuda.graph_spec)
    assert optimization.cuda.graphs is bool(specs) is (config.backend == "tensorrt")
    shapes = []
    for spec in specs:
        assert 1 <= spec.batch_size <= config.max_batch_size
        assert set(spec.input) == {tensor.name for tensor in config.input}
        for tensor in config.input:
            for said, asked in zip(spec.input[tensor.name].dim, tensor.dims, strict=True):
                assert said == asked or (asked == -1 and said > 0)
        shapes.append((spec.batch_size, *(tuple(spec.input[tensor.name].dim) for tensor in config.input)))
    assert len(set(shapes)) == len(shapes)


def _require_warmup(config: Any, warmup: Any, folder: Path) -> None:
    assert 1 <= warmup.batch_size <= max(1, config.max_batch_size)
    assert set(warmup.inputs) == {tensor.name for tensor in config.input}
    for tensor in config.input:
        given = warmup.inputs[tensor.name]
        assert given.data_type == tensor.data_type
        for said, asked in zip(given.dims, tensor.dims, strict=True):
            assert said == asked or (asked == -1 and said > 0)
        size = math.prod(given.dims) * SIZES[model_config_pb2.DataType.Name(given.data_type)]
        if given.input_data_file:
            data = (folder / "warmup" / given.input_data_file).read_bytes()
            assert len(data) == size
            assert (
                np.frombuffer(data, np.int64 if size == 8 * math.prod(given.dims) else np.uint8) == 1
            ).all()
        else:
            assert given.zero_data
