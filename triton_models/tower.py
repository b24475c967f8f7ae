"""A tower behind Triton's Python backend: what the stock C++ backends do, on a server that pip installed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Backend, Engine, open_backend
from runtime.errors import EngineError
from runtime.manifest import Precision

__all__ = ["THREADS", "TowerConfig", "TowerServer", "groups_by_shape", "tower_config_from_triton"]

_TOWER_NAME = re.compile(rf".+_(?:text|image)_tower_({'|'.join(p.value for p in Precision)})(?:_[a-z]+)?")
THREADS = {
    Engine.ONNXRUNTIME: "intra_op_thread_count",
    Engine.OPENVINO: "INFERENCE_NUMTHREADS",
}
"""The parameter that the stock backend of each engine reads its threads from."""


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """What ``config.pbtxt`` says of a tower."""

    graph: str
    precision: Precision
    threads: int | None
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]


def tower_config_from_triton(config_json: str, engine: Engine) -> TowerConfig:
    """Parse the configuration that Triton passes to a model.

    Raises:
        EngineError: it lacks what a tower needs.
    """
    config = json.loads(config_json)
    parameters = {key: entry["string_value"] for key, entry in config.get("parameters", {}).items()}
    named = _TOWER_NAME.fullmatch(config["name"])
    if named is None:
        raise EngineError(
            f"{config['name']!r} is no tower's name (NAME_text_tower_fp32, ...), so its precision is "
            "unknown, and none is guessed. Export the checkpoint again."
        )
    threads = parameters.get(THREADS[engine])
    return TowerConfig(
        graph=config["default_model_filename"],
        precision=Precision(named[1]),
        threads=int(threads) if threads else None,
        inputs={t["name"]: (t["data_type"], tuple(map(int, t["dims"]))) for t in config["input"]},
        outputs={t["name"]: (t["data_type"], tuple(map(int, t["dims"]))) for t in config["output"]},
    )


class TowerServer:
    """An opened tower that runs requests of equal shape together."""

    def __init__(self, folder: Path, config: TowerConfig, engine: Engine) -> None:
        graph = folder / config.graph
        check_tensors(config, engine, graph)
        self._backend: Backend = open_backend(
            engine, graph, precision=config.precision, threads=config.threads
        )
        self._outputs = list(config.outputs)

    def close(self) -> None:
        """Release the graph."""
        self._backend.close()

    def run(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]], wanted: Sequence[Sequence[str]]
    ) -> list[dict[str, NDArray[Any]] | EngineError]:
        """Outputs of each request, in order; a group of equal shapes fails together."""
        found: list[dict[str, NDArray[Any]] | EngineError] = [EngineError("not run")] * len(inputs)
        for group in groups_by_shape(inputs):
            names = [name for name in self._outputs if any(name in wanted[i] for i in group)]
            sizes = [len(next(iter(inputs[i].values()))) for i in group]
            joined = {
                name: inputs[group[0]][name]
                if len(group) == 1
                else np.concatenate([inputs[i][name] for i in group])
                for name in inputs[group[0]]
            }
            try:
                outputs = self._backend.run(joined, names)
            except EngineError as error:
                for i in group:
                    found[i] = error
                continue
            starts = np.cumsum([0, *sizes])
            for at, i in enumerate(group):
                rows = slice(int(starts[at]), int(starts[at + 1]))
                found[i] = {n: o[rows] for n, o in zip(names, outputs, strict=True) if n in wanted[i]}
        return found


def groups_by_shape(inputs: Sequence[Mapping[str, NDArray[Any]]]) -> list[list[int]]:
    """Positions of requests whose tensors have equal shapes but for their rows."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, tensors in enumerate(inputs):
        shape = tuple((name, array.shape[1:]) for name, array in sorted(tensors.items()))
        groups.setdefault(shape, []).append(i)
    return list(groups.values())


def check_tensors(config: TowerConfig, engine: Engine, graph: Path) -> None:
    """Hold a configuration to the graph, as the stock backends do when they load a model.

    Raises:
        EngineError: names, types or shapes differ.
    """
    if not graph.is_file():
        raise EngineError(f"Graph {graph} is missing. Copy the repository again, or export again.")
    found = _TENSORS[engine](graph)
    for side, said, has in (("input", config.inputs, found[0]), ("output", config.outputs, found[1])):
        if dict(said) != has:
            raise EngineError(f"config.pbtxt says {side} {dict(said)}; {graph.name} has {has}. Export again.")


_Tensors = dict[str, tuple[str, tuple[int, ...]]]


def _onnxruntime_tensors(graph: Path) -> tuple[_Tensors, _Tensors]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    types = {
        "tensor(float)": "TYPE_FP32",
        "tensor(float16)": "TYPE_FP16",
        "tensor(int64)": "TYPE_INT64",
        "tensor(int32)": "TYPE_INT32",
        "tensor(uint8)": "TYPE_UINT8",
    }

    def tensors(values: Any) -> _Tensors:
        return {
            v.name: (types.get(v.type, v.type), tuple(d if isinstance(d, int) else -1 for d in v.shape[1:]))
            for v in values
        }

    return tensors(session.get_inputs()), tensors(session.get_outputs())


def _openvino_tensors(graph: Path) -> tuple[_Tensors, _Tensors]:
    import openvino

    model = openvino.Core().read_model(str(graph))
    types = {
        "f32": "TYPE_FP32",
        "f16": "TYPE_FP16",
        "i64": "TYPE_INT64",
        "i32": "TYPE_INT32",
        "u8": "TYPE_UINT8",
    }

    def tensors(values: Any) -> _Tensors:
        found: _Tensors = {}
        for value in values:
            kind = value.get_element_type().get_type_name()
            dims = tuple(-1 if d.is_dynamic else d.get_length() for d in value.get_partial_shape())
            found[value.get_any_name()] = (types.get(kind, kind), dims[1:])
        return found

    return tensors(model.inputs), tensors(model.outputs)


_TENSORS = {Engine.ONNXRUNTIME: _onnxruntime_tensors, Engine.OPENVINO: _openvino_tensors}
