"""Tower in Triton's Python backend, replacing the stock C++ backends on a pip-installed server."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import open_graph
from runtime.backends.backend import Backend, Signature, TensorType
from runtime.errors import EngineError, InputError
from runtime.manifest import Engine, Precision
from runtime.opening.probes import OPENING_FILE, OpeningProbes
from runtime.opening.tower_check import require_opening

__all__ = [
    "MAX_LENGTH",
    "MAX_ROWS",
    "VOCABULARY_SIZE",
    "TowerConfig",
    "TowerServer",
    "groups_by_shape",
    "tower_config_from_triton",
]

MAX_ROWS, MAX_LENGTH = "babeltower_max_rows", "babeltower_context_length"
"""Parameters of ``config.pbtxt`` that bound a request: rows, and tokens in a row."""

VOCABULARY_SIZE = "babeltower_vocabulary_size"
"""Parameter of a text tower: rows of its embedding. OpenVINO reads on where there are none."""

_MOST_ROWS, _LONGEST = 64, 512
"""Bounds of a tower whose export wrote no such parameters."""

_IDS, _MASK = "input_ids", "attention_mask"
_OUT_OF_TABLE = re.compile(r"indices element out of data bounds, .*\[-\d+,\s*(\d+)\]")
"""ONNX Runtime's words on a token id that the embedding has no row for."""

_TOWER_NAME = re.compile(rf".+_(?:text|image)_tower_({'|'.join(p.value for p in Precision)})(?:_[a-z]+)?")


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """A tower's settings in ``config.pbtxt``; ``threads`` are per instance.

    ``batched`` is true if Triton batches requests, and so omits the batch from the tensors' dimensions.
    ``max_rows`` and ``max_length`` bound a request; ``max_length`` is for dynamic dimensions, the tokens.
    ``vocabulary_size`` is None for exports of before.
    """

    name: str
    graph: str
    precision: Precision
    threads: int | None
    batched: bool
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    max_rows: int
    max_length: int
    vocabulary_size: int | None

    def require_bounded(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Check a request's rows and lengths before the tower takes memory for them.

        Raises:
            InputError: there are none or too many, or the inputs' shapes do not belong together.
        """
        for name, tensor in tensors.items():
            dims = self.inputs[name][1] if self.batched else self.inputs[name][1][1:]
            rows, *lengths = tensor.shape
            if not 1 <= rows <= self.max_rows:
                raise InputError(f"{name} has {rows} rows; expected 1 to {self.max_rows}.")
            if any(dim == -1 and not 1 <= n <= self.max_length for dim, n in zip(dims, lengths, strict=True)):
                raise InputError(
                    f"{name} has shape {list(tensor.shape)}; the tower takes 1 to {self.max_length} tokens "
                    "in a row. Truncate them, as the text front end does."
                )
            if tensor.dtype.kind == "i" and (tensor < 0).any():  # a graph would count them from the end
                raise InputError(f"{name} has negative values; expected token ids, and a mask of 0 and 1.")
            if name == _IDS and self.vocabulary_size is not None and tensor.max() >= self.vocabulary_size:
                raise _unknown_ids(self.vocabulary_size - 1)
            if name == _MASK and (tensor.max() > 1 or not tensor.any(axis=1).all()):
                raise InputError(f"{name} has other values than 0 and 1, or a row without a 1.")
        if len({tensor.shape[:2] for tensor in tensors.values()}) > 1:
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise InputError(f"The inputs have the shapes {shapes}; expected equal rows and lengths.")


def tower_config_from_triton(config_json: str, engine: Engine) -> TowerConfig:
    """Parse the configuration that Triton passes to a model.

    Raises:
        EngineError: the model's name is not that of a tower.
    """
    config = json.loads(config_json)
    parameters = {key: entry["string_value"] for key, entry in config.get("parameters", {}).items()}
    named = _TOWER_NAME.fullmatch(config["name"])
    if named is None:
        raise EngineError(
            f"{config['name']!r} is not a tower's name (NAME_text_tower_fp32, ...), so its precision is "
            "unknown. Export the checkpoint again."
        )
    batch_size = int(config.get("max_batch_size", 0))
    return TowerConfig(
        name=config["name"],
        graph=config["default_model_filename"],
        precision=Precision(named[1]),
        threads=_threads(parameters, config.get("instance_group") or [{}], engine),
        batched=batch_size > 0,
        inputs={t["name"]: (t["data_type"], tuple(map(int, t["dims"]))) for t in config["input"]},
        outputs={t["name"]: (t["data_type"], tuple(map(int, t["dims"]))) for t in config["output"]},
        max_rows=batch_size or int(parameters.get(MAX_ROWS, _MOST_ROWS)),
        max_length=int(parameters.get(MAX_LENGTH, _LONGEST)),
        vocabulary_size=int(parameters[VOCABULARY_SIZE]) if VOCABULARY_SIZE in parameters else None,
    )


def _threads(
    parameters: Mapping[str, str], groups: Sequence[Mapping[str, Any]], engine: Engine
) -> int | None:
    """Return the threads per instance, from the same parameters as the engine's stock backend.

    ONNX Runtime's parameter is per instance, OpenVINO's is for all instances together.
    """
    if engine is Engine.ONNXRUNTIME:
        said = int(parameters.get("intra_op_thread_count", 0))
    else:
        together = int(parameters.get("INFERENCE_NUM_THREADS", 0))
        said = together and max(1, together // max(1, sum(int(g.get("count", 1)) for g in groups)))
    return said or None


class TowerServer:
    """Opened tower that runs requests of equal shape together.

    Raises:
        EngineError: the graph cannot be opened, or does not match its configuration.
        OpeningCheckError: its vectors for the probes beside it differ from PyTorch's on this machine.
        ManifestError: the probes are damaged.
    """

    def __init__(self, folder: Path, config: TowerConfig, engine: Engine) -> None:
        self._backend = open_graph(
            engine, folder / config.graph, precision=config.precision, threads=config.threads
        )
        try:
            check_tensors(config, self._backend.signature)
            _require_opening(folder / OPENING_FILE, self._backend, config, engine)
        except BaseException:
            self._backend.close()
            raise
        self._config = config
        self._outputs = list(config.outputs)

    def close(self) -> None:
        """Release the graph."""
        self._backend.close()

    def run(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]], wanted: Sequence[Sequence[str]]
    ) -> list[dict[str, NDArray[Any]] | EngineError | InputError]:
        """Return the outputs of each request, in order.

        A request over the tower's bounds, or with token ids outside of its vocabulary, fails alone; requests
        of equal shapes are run, and fail, together.
        """
        found: list[dict[str, NDArray[Any]] | EngineError | InputError] = [EngineError("not run")] * len(
            inputs
        )
        bounded = []
        for i, tensors in enumerate(inputs):
            try:
                self._config.require_bounded(tensors)
                bounded.append(i)
            except InputError as error:
                found[i] = error
        groups = deque(
            [bounded[at] for at in positions] for positions in groups_by_shape([inputs[i] for i in bounded])
        )
        while groups:
            group = groups.popleft()
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
                beyond = _OUT_OF_TABLE.search(str(error))
                if beyond is not None and len(group) > 1:  # the ids of one request, not of the others
                    groups.extend([i] for i in group)
                    continue
                for i in group:
                    found[i] = error if beyond is None else _unknown_ids(int(beyond[1]))
                continue
            starts = np.cumsum([0, *sizes])
            for at, i in enumerate(group):
                rows = slice(int(starts[at]), int(starts[at + 1]))
                found[i] = {n: o[rows] for n, o in zip(names, outputs, strict=True) if n in wanted[i]}
        return found


def _unknown_ids(highest: int) -> InputError:
    return InputError(f"A token id is over {highest}, the highest of the tower's vocabulary.")


def _require_opening(path: Path, backend: Backend, config: TowerConfig, engine: Engine) -> None:
    """Run the opening check, if there are probes; for older exports, the server's starter checks it."""
    if path.is_file():
        require_opening(
            backend,
            OpeningProbes.read(path),
            tower=config.name,
            engine=engine,
            precision=config.precision,
            others="another variant (`babeltower frontends --variant`)",
        )


def groups_by_shape(inputs: Sequence[Mapping[str, NDArray[Any]]]) -> list[list[int]]:
    """Group the positions of requests whose tensors have equal shapes, apart from the number of rows."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, tensors in enumerate(inputs):
        shape = tuple((name, array.shape[1:]) for name, array in sorted(tensors.items()))
        groups.setdefault(shape, []).append(i)
    return list(groups.values())


def check_tensors(config: TowerConfig, signature: Signature) -> None:
    """Check a configuration against the graph, as the stock backends do when loading a model.

    Raises:
        EngineError: names, types or shapes differ.
    """
    for side, said, has in (
        ("input", config.inputs, signature.inputs),
        ("output", config.outputs, signature.outputs),
    ):
        found = {name: _as_configured(tensor, batched=config.batched) for name, tensor in has.items()}
        if dict(said) != found:
            raise EngineError(
                f"config.pbtxt has {side} {dict(said)}; {config.graph} has {found}. Export again."
            )


def _as_configured(tensor: TensorType, *, batched: bool) -> tuple[str, tuple[int, ...]]:
    """Return a tensor's type and dimensions as in ``config.pbtxt``, without the batch if Triton batches."""
    return _DATA_TYPES.get(tensor.dtype, tensor.dtype), tensor.shape[1:] if batched else tensor.shape


_DATA_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
}
