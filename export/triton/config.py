"""Write ``config.pbtxt`` from typed dataclasses, and check it against the graph."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import ExportError
from runtime.triton_config import config_from_text, configuration_messages

if TYPE_CHECKING:
    import onnx

__all__ = [
    "CudaGraph",
    "GpuOptimization",
    "InstanceGroup",
    "ModelConfig",
    "QueuePolicy",
    "TensorConfig",
    "Warmup",
    "WarmupInput",
    "check_against_graph",
    "tensors_of_graph",
]


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """Input or output of a model; ``dims`` are without the batch, -1 if dynamic.

    A request may omit an optional input.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """Number of model instances and their device; ``profiles`` are those of a TensorRT plan."""

    count: int = 1
    kind: str = "KIND_CPU"
    profiles: tuple[int, ...] = ()

    def to_pbtxt(self) -> str:
        """Return the block of ``config.pbtxt``."""
        profiles = ", ".join(f'"{index}"' for index in self.profiles)
        listed = f"  profile: [ {profiles} ]\n" if profiles else ""
        return f"instance_group {{\n  count: {self.count}\n  kind: {self.kind}\n{listed}}}"


@dataclass(frozen=True, slots=True)
class CudaGraph:
    """Shape that TensorRT's backend captures as a CUDA graph; ``dims`` are without the batch."""

    batch_size: int
    dims: Mapping[str, tuple[int, ...]]

    def to_pbtxt(self) -> str:
        """Return the block of ``optimization.cuda``, indented."""
        lines = [
            f"      input {{ key: {json.dumps(name)} value {{ dim: [ {', '.join(map(str, dims))} ] }} }}"
            for name, dims in self.dims.items()
        ]
        return "\n".join(["    graph_spec {", f"      batch_size: {self.batch_size}", *lines, "    }"])


@dataclass(frozen=True, slots=True)
class GpuOptimization:
    """Block ``optimization`` of a model on a GPU; its tensors are copied through pinned memory.

    Attributes:
        provider: Options of ONNX Runtime's CUDA provider.
        graphs: CUDA graphs of TensorRT's backend, captured for every profile that admits the shape.
    """

    provider: Mapping[str, str] = field(default_factory=dict)
    graphs: tuple[CudaGraph, ...] = ()

    def to_pbtxt(self) -> str:
        """Return the block of ``config.pbtxt``."""
        lines = ["optimization {"]
        if self.graphs:
            lines += ["  cuda {", "    graphs: true", *(graph.to_pbtxt() for graph in self.graphs), "  }"]
        if self.provider:
            lines += ["  execution_accelerators {", "    gpu_execution_accelerator {", '      name: "cuda"']
            lines += [
                f"      parameters {{ key: {json.dumps(key)} value: {json.dumps(value)} }}"
                for key, value in self.provider.items()
            ]
            lines += ["    }", "  }"]
        lines += ["  input_pinned_memory { enable: true }", "  output_pinned_memory { enable: true }", "}"]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Limits of a model's request queue.

    Attributes:
        max_size: Maximum number of queued requests; further ones are answered UNAVAILABLE. 0 for no limit.
        timeout_ms: Maximum queueing time; the request is then answered UNAVAILABLE. 0 for no limit.
        priority_levels: Number of priorities; 1 is served first and is the default. 0 for no priorities.
    """

    max_size: int = 0
    timeout_ms: int = 0
    priority_levels: int = 0


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """Input tensor of a warm-up request.

    Its bytes are in ``warmup/FILE`` beside ``config.pbtxt``, or all zero if ``file`` is None.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Warmup:
    """Warm-up request that Triton runs before the model is ready; ``batch_size`` copies of its tensors."""

    name: str
    batch_size: int
    inputs: tuple[WarmupInput, ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Configuration of a Triton model.

    With ``batches``, Triton's dynamic batcher delays a request by up to ``max_queue_delay_us`` to batch it;
    of the queued requests, it takes as many as make up one of ``preferred_batch_sizes``, if any do.
    Without, each request is run by itself, with up to ``max_batch_size`` rows; if ``max_batch_size`` is 0,
    any number of rows is allowed, and ``dims`` include the batch. ``filename`` is the file of a version
    folder that the backend opens, ``platform`` Triton's name of its format where required.
    ``gpu`` is set for instances on a GPU.
    """

    name: str
    backend: str
    max_batch_size: int
    inputs: Sequence[TensorConfig]
    outputs: Sequence[TensorConfig]
    batches: bool = True
    max_queue_delay_us: int = 0
    parameters: Mapping[str, str] = field(default_factory=dict)
    filename: str = "model.onnx"
    platform: str = ""
    instances: InstanceGroup | None = None
    queue: QueuePolicy | None = None
    warmups: tuple[Warmup, ...] = ()
    preferred_batch_sizes: tuple[int, ...] = ()
    gpu: GpuOptimization | None = None

    def to_pbtxt(self) -> str:
        """Return the text format of ``inference.ModelConfig``.

        Raises:
            ExportError: the text does not parse back to the same configuration.
        """
        text = "\n".join(self._blocks()) + "\n"
        self._parse_back(text)
        return text

    def _blocks(self) -> Iterator[str]:
        yield f"name: {json.dumps(self.name)}"
        yield f"backend: {json.dumps(self.backend)}"
        if self.platform:
            yield f"platform: {json.dumps(self.platform)}"
        yield f"default_model_filename: {json.dumps(self.filename)}"
        yield f"max_batch_size: {self.max_batch_size}"
        yield from (_tensor_pbtxt("input", tensor) for tensor in self.inputs)
        yield from (_tensor_pbtxt("output", tensor) for tensor in self.outputs)
        if self.batches and self.max_batch_size:
            yield _batching_pbtxt(
                self.max_queue_delay_us, self.queue or QueuePolicy(), self.preferred_batch_sizes
            )
        if self.instances is not None:
            yield self.instances.to_pbtxt()
        if self.gpu is not None:
            yield self.gpu.to_pbtxt()
        yield from map(_warmup_pbtxt, self.warmups)
        for key, value in self.parameters.items():
            yield (
                f"parameters {{\n  key: {json.dumps(key)}\n"
                f"  value {{ string_value: {json.dumps(value, ensure_ascii=False)} }}\n}}"
            )

    def _parse_back(self, text: str) -> None:
        parsed = config_from_text(text, origin=f"The config.pbtxt of {self.name}")
        data_type = configuration_messages().DataType
        tensors = (
            tuple(
                TensorConfig(t.name, data_type.Name(t.data_type), tuple(t.dims), t.optional)
                for t in parsed.input
            ),
            tuple(TensorConfig(t.name, data_type.Name(t.data_type), tuple(t.dims)) for t in parsed.output),
        )
        meant = (tuple(self.inputs), tuple(self.outputs))
        if tensors != meant or parsed.name != self.name or parsed.max_batch_size != self.max_batch_size:
            raise ExportError(f"The config.pbtxt of {self.name} parses to {tensors}; expected {meant}.")
        parameters = {key: value.string_value for key, value in parsed.parameters.items()}
        if parameters != dict(self.parameters):
            raise ExportError(
                f"The config.pbtxt of {self.name} has the parameters {parameters}; "
                f"expected {dict(self.parameters)}."
            )


def tensors_of_graph(
    path: Path, *, batched: bool = True
) -> tuple[tuple[TensorConfig, ...], tuple[TensorConfig, ...]]:
    """Read the inputs and outputs of an ONNX file, without the batch dimension if ``batched``.

    Raises:
        ExportError: a tensor has a fixed first dimension, or a type that towers do not use.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    inputs, outputs = (
        tuple(_tensor_of_value(value, batched=batched) for value in values)
        for values in (graph.input, graph.output)
    )
    return inputs, outputs


def check_against_graph(config: ModelConfig, path: Path) -> None:
    """Check that a configuration matches the graph in names, order, types and shapes.

    Raises:
        ExportError: they differ; Triton might reject the model, or serve it incorrectly.
    """
    inputs, outputs = tensors_of_graph(path, batched=config.max_batch_size > 0)
    if (tuple(config.inputs), tuple(config.outputs)) != (inputs, outputs):
        raise ExportError(
            f"config.pbtxt of {config.name} has {config.inputs} → {config.outputs}, but {path.name} has "
            f"{inputs} → {outputs}."
        )


def _tensor_of_value(value: onnx.ValueInfoProto, *, batched: bool) -> TensorConfig:
    from onnx import TensorProto

    types = {
        TensorProto.FLOAT: "TYPE_FP32",
        TensorProto.FLOAT16: "TYPE_FP16",
        TensorProto.INT64: "TYPE_INT64",
        TensorProto.INT32: "TYPE_INT32",
        TensorProto.UINT8: "TYPE_UINT8",
    }
    kind = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    if not dims or dims[0] != -1:
        raise ExportError(f"{value.name} has shape {dims}; its batch dimension must be dynamic.")
    if kind.elem_type not in types:
        raise ExportError(f"{value.name} has ONNX type {kind.elem_type}, which is not supported for towers.")
    return TensorConfig(value.name, types[kind.elem_type], dims[1:] if batched else dims)


def _tensor_pbtxt(kind: str, tensor: TensorConfig) -> str:
    dims = ", ".join(map(str, tensor.dims))
    optional = "  optional: true\n" if tensor.optional else ""
    return (
        f"{kind} {{\n  name: {json.dumps(tensor.name)}\n  data_type: {tensor.data_type}\n"
        f"  dims: [ {dims} ]\n{optional}}}"
    )


def _batching_pbtxt(max_queue_delay_us: int, queue: QueuePolicy, preferred: Sequence[int]) -> str:
    lines = [f"  max_queue_delay_microseconds: {max_queue_delay_us}"]
    if preferred:
        lines.append(f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]")
    if queue.priority_levels:
        lines += [f"  priority_levels: {queue.priority_levels}", "  default_priority_level: 1"]
    if queue.max_size or queue.timeout_ms:
        lines += [
            "  default_queue_policy {",
            "    timeout_action: REJECT",
            f"    default_timeout_microseconds: {queue.timeout_ms * 1000}",
            "    allow_timeout_override: true",
            f"    max_queue_size: {queue.max_size}",
            "  }",
        ]
    return "\n".join(["dynamic_batching {", *lines, "}"])


def _warmup_pbtxt(warmup: Warmup) -> str:
    lines = [
        "model_warmup {",
        f"  name: {json.dumps(warmup.name)}",
        f"  batch_size: {warmup.batch_size}",
    ]
    for tensor in warmup.inputs:
        dims = ", ".join(map(str, tensor.dims))
        lines += [
            "  inputs {",
            f"    key: {json.dumps(tensor.name)}",
            "    value {",
            f"      data_type: {tensor.data_type}",
            f"      dims: [ {dims} ]",
            "      zero_data: true"
            if tensor.file is None
            else f"      input_data_file: {json.dumps(tensor.file)}",
            "    }",
            "  }",
        ]
    return "\n".join([*lines, "}"])
