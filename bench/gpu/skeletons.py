"""Graphs without their weights: kilobytes that stand for gigabytes, filled with random numbers elsewhere.

Speed does not depend on the numbers, as long as they have a real spread and are not zeros. A skeleton is
``NAME.onnx``, whose large weights are external and absent, and ``NAME.json`` with each weight's type, shape,
mean and deviation.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from bench.gpu.towers import TimedTower
from runtime.errors import BabeltowerError

__all__ = ["graph_from_skeleton", "require_activation", "skeleton_from_graph"]

_ACTIVATIONS = {"gelu": "Erf", "quick_gelu": "Sigmoid", "relu": "Relu"}
"""Operator by which a graph computes an activation, by the activation's name in transformers."""

_SMALL_BYTES = 1024
_ALIGNMENT = 4096
_BLOCK = 1 << 22
_N_THREADS = 8


@dataclass(frozen=True, slots=True)
class _Weight:
    """Weight of a skeleton, and its offset in the data file."""

    dtype: str
    shape: tuple[int, ...]
    mean: float
    deviation: float
    offset: int

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def skeleton_from_graph(source: Path, target: Path) -> None:
    """Write a graph without its large weights to ``target``, and their spread beside it."""
    model = onnx.load(str(source))
    spread = {}
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.nbytes < _SMALL_BYTES:
            continue
        floats = array.dtype.kind == "f"
        mean, deviation = (float(array.mean()), float(array.std())) if floats else (0.0, 0.0)
        spread[tensor.name] = [str(array.dtype), list(array.shape), mean, deviation]
        for field in ("raw_data", "float_data", "int64_data", "int32_data"):
            tensor.ClearField(field)
        _make_external(tensor, "absent", 0, 0)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(model.SerializeToString())
    target.with_suffix(".json").write_text(json.dumps(spread) + "\n", encoding="utf-8")


def require_activation(skeleton: Path, tower: TimedTower) -> None:
    """Check that a graph has a tower's activation, which its PyTorch peer computes, in every layer.

    Raises:
        BabeltowerError: it has another one, or too few.
    """
    nodes = onnx.load(str(skeleton), load_external_data=False).graph.node
    counts = {name: sum(node.op_type == kind for node in nodes) for name, kind in _ACTIVATIONS.items()}
    others = sum(counts.values()) - counts[tower.activation]
    if others or counts[tower.activation] < tower.layers:
        raise BabeltowerError(
            f"{tower.name} is declared with {tower.activation!r} in {tower.layers} layers, but its graph has "
            f"{counts}. Correct its activation in bench/gpu/towers.py."
        )


def graph_from_skeleton(skeleton: Path, folder: Path) -> Path:
    """Return ``FOLDER/NAME.onnx`` with random weights of the recorded spread, writing it if it is missing."""
    target = folder / skeleton.name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    model = onnx.load(str(skeleton), load_external_data=False)
    data = target.with_suffix(".data")
    weights = _placed(json.loads(skeleton.with_suffix(".json").read_text(encoding="utf-8")))
    for tensor in model.graph.initializer:
        if (weight := weights.get(tensor.name)) is not None:
            _make_external(tensor, data.name, weight.offset, weight.n_bytes)
    data.touch()
    os.truncate(data, sum(_aligned(weight.n_bytes) for weight in weights.values()))
    block = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32)
    with ThreadPoolExecutor(_N_THREADS) as pool:
        for _ in pool.map(lambda weight: _fill(data, weight, block), weights.values()):
            pass
    target.write_bytes(model.SerializeToString())
    return target


def _placed(spread: dict[str, list[object]]) -> dict[str, _Weight]:
    placed = {}
    offset = 0
    for name, (dtype, shape, mean, deviation) in spread.items():
        weight = _Weight(str(dtype), tuple(shape), float(mean), float(deviation), offset)  # type: ignore[arg-type]
        placed[name] = weight
        offset += _aligned(weight.n_bytes)
    return placed


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _fill(data: Path, weight: _Weight, block: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    """Write random numbers; each chunk starts at another place of the block."""
    file = np.memmap(data, weight.dtype, mode="r+", offset=weight.offset, shape=weight.shape)
    array = file.reshape(-1)
    for start in range(0, array.size, block.size):
        n = min(block.size, array.size - start)
        numbers = np.roll(block, start % 9_973 + weight.offset % 997)[:n]
        array[start : start + n] = (weight.mean + weight.deviation * numbers).astype(weight.dtype)
    file.flush()


def _make_external(tensor: onnx.TensorProto, location: str, offset: int, n_bytes: int) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(n_bytes))):
        tensor.external_data.add(key=key, value=value)
