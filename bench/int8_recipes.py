"""Which form of an INT8 graph does each engine run fastest? The table of decision 0007.

    python -m bench.int8_recipes GRAPH.onnx [GRAPH.onnx …] --rows 8 --tokens 16

Each FP32 graph is quantised once for each target, and every form is run by every engine, one thread, in
turns; the figure is rows per second of CPU time. Inputs are random: speed does not depend on them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import onnx_ir
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from export.int8 import Target, int8_from_onnx, recipe_for
from runtime.backends import GRAPH_ENGINES, Backend, open_backend
from runtime.manifest import Precision

__all__ = ["random_inputs", "rows_per_core_second"]

_N_TOKENS_KNOWN = 1_000
_PAD_ID = 1


def random_inputs(graph: Path, *, n_rows: int, n_tokens: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs of a tower's graph; the last row of texts ends in padding."""
    random = np.random.default_rng(seed)
    first = onnx_ir.load(graph).graph.inputs[0]
    if first.name == "pixels":
        assert first.shape is not None
        shape = [n_rows, *(int(str(side)) for side in first.shape[1:])]
        return {"pixels": random.integers(0, 256, shape, dtype=np.uint8)}
    ids = random.integers(3, _N_TOKENS_KNOWN, (n_rows, n_tokens))
    if n_rows > 1:
        ids[-1, n_tokens // 2 :] = _PAD_ID
    return {"input_ids": ids, "attention_mask": (ids != _PAD_ID).astype(np.int64)}


def rows_per_core_second(
    backends: Mapping[str, Backend], inputs: Mapping[str, NDArray[Any]], *, seconds: float, n_turns: int
) -> dict[str, float]:
    """Median over the turns; each turn runs every backend for about ``seconds``."""
    n_rows = len(next(iter(inputs.values())))
    n_runs, found = {}, {}
    for name, backend in backends.items():
        backend.run(inputs, ["vector"])
        n_runs[name] = max(1, int(seconds / max(_cpu_seconds(backend, inputs, 1), 1e-4)))
        found[name] = [0.0] * n_turns
    for turn in range(n_turns):
        for name, backend in backends.items():
            found[name][turn] = n_rows * n_runs[name] / _cpu_seconds(backend, inputs, n_runs[name])
    return {name: median(values) for name, values in found.items()}


def _cpu_seconds(backend: Backend, inputs: Mapping[str, NDArray[Any]], n_runs: int) -> float:
    started = time.process_time()
    for _ in range(n_runs):
        backend.run(inputs, ["vector"])
    return time.process_time() - started


def main(
    graphs: Annotated[list[Path], typer.Argument(help="FP32 graphs of towers.")],
    rows: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=2)] = 16,
    seconds: Annotated[float, typer.Option(help="A turn of one engine and form.")] = 0.5,
    turns: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Quantise for every target, run in every engine, print rows per core-second."""
    table = Table("tower", "engine", "fp32", *(f"for {target.value}" for target in Target))
    for graph in graphs:
        inputs = random_inputs(graph, n_rows=rows, n_tokens=tokens)
        calibration = [random_inputs(graph, n_rows=4, n_tokens=tokens, seed=seed) for seed in (1, 2)]
        with tempfile.TemporaryDirectory() as folder:
            forms = {"fp32": graph}
            for target in Target:
                forms[target.value] = Path(folder) / f"{target.value}.onnx"
                int8_from_onnx(
                    graph,
                    forms[target.value],
                    data_name=f"{target.value}.data",
                    calibration=calibration,
                    recipe=recipe_for(target),
                )
            for engine in GRAPH_ENGINES:
                backends = {
                    name: open_backend(
                        engine,
                        path,
                        precision=Precision.FP32 if name == "fp32" else Precision.INT8,
                        threads=1,
                    )
                    for name, path in forms.items()
                }
                speed = rows_per_core_second(backends, inputs, seconds=seconds, n_turns=turns)
                table.add_row(graph.parent.name, engine.value, *(f"{value:.1f}" for value in speed.values()))
                for backend in backends.values():
                    backend.close()
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
