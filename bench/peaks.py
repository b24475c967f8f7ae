"""What this machine can do at most: matrix products in FP32, BF16 and INT8, and copying memory.

    python -m bench.peaks

One thread, by CPU time. Products are a chain of OpenVINO's fully connected layers on 1,024 rows, as wide as
the towers' own (768 → 3,072 → 768). INT8 is uint8 × int8, requantised between the layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.records import Record, interval, record_of

__all__ = ["PEAKS", "Sampler", "measure_peaks", "peak_samplers"]

PEAKS = ("fp32", "bf16", "int8")
_ROWS, _WIDTH, _OUT = 1_024, 768, 3_072
_N_PRODUCTS = 4
_COPIED_BYTES = 256 << 20

Sampler = Callable[[], float]
"""Measures once: GOP/s (GB/s for memory)."""


def peak_samplers(precisions: Sequence[str] = PEAKS, *, seconds: float = 0.3) -> dict[str, Sampler]:
    """One sampler for each precision; two operations a multiply–add."""
    found: dict[str, Sampler] = {}
    for precision in precisions:
        run = _product(precision)
        found[precision] = _sampler(run, 2 * _N_PRODUCTS * _ROWS * _WIDTH * _OUT / 1e9, seconds)
    return found


def measure_peaks(*, turns: int = 7) -> list[Record]:
    """Every peak in turns, memory copy included (GB/s of reading and writing together)."""
    samplers = dict(peak_samplers())
    source = np.ones(_COPIED_BYTES, np.uint8)
    target = np.empty_like(source)
    samplers["copy"] = _sampler(lambda: np.copyto(target, source), 2 * _COPIED_BYTES / 1e9, 0.3)
    samples: Mapping[str, list[float]] = {name: [] for name in samplers}
    for _ in range(turns):
        for name, sample in samplers.items():
            samples[name].append(sample())
    settings = {"threads": 1, "turns": turns, "rows": _ROWS, "in": _WIDTH, "out": _OUT}
    return [
        record_of({"peak": name}, values, unit="GB/s" if name == "copy" else "GOP/s", settings=settings)
        for name, values in samples.items()
    ]


def _sampler(run: Callable[[], Any], giga: float, seconds: float) -> Sampler:
    run()

    def sample() -> float:
        started, n = time.process_time(), 0
        while time.process_time() - started < seconds:
            run()
            n += 1
        return n * giga / (time.process_time() - started)

    return sample


def _product(precision: str) -> Callable[[], Any]:
    """Products of ``_ROWS`` rows and constant weights in a chain, so that reorders weigh little."""
    import openvino
    from openvino import opset13 as op

    random = np.random.default_rng(0)
    value = data = op.parameter([_ROWS, _WIDTH], np.float32)
    for i in range(_N_PRODUCTS):
        width, out = (_WIDTH, _OUT) if i % 2 == 0 else (_OUT, _WIDTH)
        weight = random.standard_normal((out, width)).astype(np.float32) * np.float32(0.03)
        operands = value, op.constant(weight)
        if precision == "int8":
            operands = _fake(op, value, 0.0, 4.0, 256), _fake(op, operands[1], -0.15, 0.15, 255)
        value = op.matmul(*operands, False, True)
    model = openvino.Model([op.relu(value)], [data])
    hint = "bf16" if precision == "bf16" else "f32"
    properties = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
    request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()
    inputs = [random.random((_ROWS, _WIDTH), np.float32)]

    def run() -> None:
        request.infer(inputs, share_inputs=True, share_outputs=True)

    return run


def _fake(op: Any, value: Any, low: float, high: float, levels: int) -> Any:
    ends = [op.constant(np.float32(end)) for end in (low, high, low, high)]
    return op.fake_quantize(value, *ends, levels)


def main() -> None:
    """Measure and print."""
    table = Table("peak", "median", "interval", "unit")
    for record in measure_peaks():
        low, high = interval(record.samples)
        table.add_row(record.cell["peak"], f"{record.median:.1f}", f"{low:.1f}–{high:.1f}", record.unit)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
