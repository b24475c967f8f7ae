"""``config.pbtxt`` from typed dataclasses, parsed back and compared with the graph it stands beside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from runtime.errors import ExportError

__all__ = ["ModelConfig", "TensorConfig", "check_against_graph", "tensors_of_graph"]

_TRITON_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
}


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """One input or output; ``dims`` without the batch, -1 where dynamic."""

    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Triton model; ``max_queue_delay_us`` is what a lone request may wait for company."""

    name: str
    backend: str
    max_batch_size: int
    inputs: Sequence[TensorConfig]
    outputs: Sequence[TensorConfig]
    max_queue_delay_us: int = 0
    parameters: Mapping[str, str] = field(default_factory=dict)

    def to_pbtxt(self) -> str:
        """Text format of ``inference.ModelConfig``.

        Raises:
            ExportError: the text does not parse back to what was meant.
        """
        lines = [
            f"name: {json.dumps(self.name)}",
            f"backend: {json.dumps(self.backend)}",
            'default_model_filename: "model.onnx"',
            f"max_batch_size: {self.max_batch_size}",
            *(_tensor_pbtxt("input", tensor) for tensor in self.inputs),
            *(_tensor_pbtxt("output", tensor) for tensor in self.outputs),
            f"dynamic_batching {{\n  max_queue_delay_microseconds: {self.max_queue_delay_us}\n}}",
            *(
                f"parameters {{\n  key: {json.dumps(k)}\n  value {{ string_value: {json.dumps(v)} }}\n}}"
                for k, v in self.parameters.items()
            ),
        ]
        text = "\n".join(lines) + "\n"
        self._parse_back(text)
        return text

    def _parse_back(self, text: str) -> None:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2

        try:
            parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
        except text_format.ParseError as error:
            raise ExportError(f"The config.pbtxt of {self.name} does not parse: {error}.") from error
        tensors = tuple(
            tuple(
                TensorConfig(t.name, model_config_pb2.DataType.Name(t.data_type), tuple(t.dims))
                for t in group
            )
            for group in (parsed.input, parsed.output)
        )
        meant = (tuple(self.inputs), tuple(self.outputs))
        if tensors != meant or parsed.name != self.name or parsed.max_batch_size != self.max_batch_size:
            raise ExportError(f"The config.pbtxt of {self.name} parses to {tensors}, meant was {meant}.")


def tensors_of_graph(path: Path) -> tuple[tuple[TensorConfig, ...], tuple[TensorConfig, ...]]:
    """Inputs and outputs of an ONNX file as Triton names them, the batch dimension dropped.

    Raises:
        ExportError: a tensor whose first dimension is fixed, or of a type that towers do not use.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    return tuple(map(_tensor_of_value, graph.input)), tuple(map(_tensor_of_value, graph.output))


def check_against_graph(config: ModelConfig, path: Path) -> None:
    """Hold a config to the graph it stands beside: names, order, types and shapes.

    Raises:
        ExportError: they differ; Triton would refuse the model, or worse, not.
    """
    inputs, outputs = tensors_of_graph(path)
    if (tuple(config.inputs), tuple(config.outputs)) != (inputs, outputs):
        raise ExportError(
            f"config.pbtxt of {config.name} says {config.inputs} → {config.outputs}; "
            f"{path.name} has {inputs} → {outputs}."
        )


def _tensor_of_value(value: onnx.ValueInfoProto) -> TensorConfig:
    kind = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    if not dims or dims[0] != -1:
        raise ExportError(f"{value.name} has shape {dims}: its batch is not dynamic.")
    if kind.elem_type not in _TRITON_TYPES:
        raise ExportError(f"{value.name} is of ONNX type {kind.elem_type}, which towers do not use.")
    return TensorConfig(value.name, _TRITON_TYPES[kind.elem_type], dims[1:])


def _tensor_pbtxt(kind: str, tensor: TensorConfig) -> str:
    dims = ", ".join(map(str, tensor.dims))
    return (
        f"{kind} {{\n  name: {json.dumps(tensor.name)}\n  data_type: {tensor.data_type}\n"
        f"  dims: [ {dims} ]\n}}"
    )
