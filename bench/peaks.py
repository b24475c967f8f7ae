"""Measure this machine's peaks: matrix products in each precision, reading and copying memory.

    python bench/peaks.py [--threads N] [--json build/bench/peaks.json]

Products are a chain of OpenVINO's fully connected layers on 1,024 rows, as wide as the towers' own (768 →
3,072 → 768); INT8 is uint8 × int8, requantized between the layers. Memory is read in working sets of several
sizes, since small weights stay in caches, which are faster than memory. One thread is measured in CPU time,
several in wall time. A GPU is measured with PyTorch; without one, the record says so.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.records.record import Record, interval, record_of, suite_cell, write_records
from runtime.errors import BabeltowerError

__all__ = ["PEAKS", "READ_MB", "Sampler", "measure_peaks", "peak_samplers", "print_peaks"]

PEAKS = ("fp32", "bf16", "int8")
READ_MB = (1, 4, 16, 64, 256)
"""Sizes of the working sets that are read repeatedly."""

_ROWS, _WIDTH, _OUT = 1_024, 768, 3_072
_N_PRODUCTS = 4
_COPIED_BYTES = 256 << 20

Sampler = Callable[[], float]
"""Function that measures once and returns GOP/s (GB/s for memory)."""


def peak_samplers(
    precisions: Sequence[str] = PEAKS, *, seconds: float = 0.3, threads: int = 1
) -> dict[str, Sampler]:
    """Return one sampler per precision; a multiply–add counts as two operations.

    Raises:
        BabeltowerError: the processor does not compute in a precision.
    """
    found: dict[str, Sampler] = {}
    for precision in precisions:
        run = _product(precision, threads)
        giga = 2 * _N_PRODUCTS * _ROWS * _WIDTH * _OUT / 1e9
        found[precision] = _sampler(run, giga, seconds, threads)
    return found


def measure_peaks(
    *, turns: int = 7, threads: int = 1, seconds: float = 0.15, gpu: bool = True
) -> list[Record]:
    """Measure every peak in turns; a peak that cannot be measured is a record with its error."""
    samplers, errors = _samplers(threads, seconds)
    samples: Mapping[str, list[float]] = {name: [] for name in samplers}
    for _ in range(turns):
        for name, sample in samplers.items():
            samples[name].append(sample())
    settings = {"threads": threads, "turns": turns, "rows": _ROWS, "in": _WIDTH, "out": _OUT}
    records = [
        record_of(_cell(name), values, unit=_unit(name), settings=settings)
        for name, values in samples.items()
    ]
    records += [
        record_of(_cell(name), [], unit=_unit(name), settings=settings, error=error)
        for name, error in errors.items()
    ]
    return records + (gpu_peaks(turns=turns) if gpu else [])


def gpu_peaks(*, turns: int = 7) -> list[Record]:
    """Measure the first GPU by its own events; without a GPU, return records with an error."""
    import torch

    names = ("fp32", "fp16", "bf16", "read 1024 MB")
    settings: dict[str, Any] = {"turns": turns, "device": "cuda"}
    if not torch.cuda.is_available():
        error = f"PyTorch {torch.__version__} finds no GPU here."
        return [
            record_of(_cell(name, "cuda"), [], unit=_unit(name), settings=settings, error=error)
            for name in names
        ]
    settings["gpu"] = torch.cuda.get_device_name()
    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    for name in names:
        giga, run = _gpu_run(name)
        values = [_by_events(run, giga) for _ in range(turns)]
        found.append(record_of(_cell(name, "cuda"), values, unit=_unit(name), settings=settings))
    return found


def _gpu_run(name: str) -> tuple[float, Callable[[], Any]]:
    """Return the giga-operations (or gigabytes) of a run, and the run."""
    import torch

    if name.startswith("read"):
        read = torch.ones(256 << 20, device="cuda", dtype=torch.float32)
        return read.numel() * 4 / 1e9, lambda: read.sum()
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    side = 4_096
    square = torch.randn(side, side, device="cuda", dtype=types[name])
    return 2 * side**3 / 1e9, lambda: square @ square


def print_peaks(records: Sequence[Record], console: Console) -> None:
    """Print one row per peak."""
    table = Table("peak", "by", "median", "95%", "unit")
    for record in records:
        name, by = record.cell["precision"], record.cell["engine"]
        if record.error is not None:
            table.add_row(name, by, "–", record.error, record.unit)
            continue
        low, high = interval(record.samples)
        table.add_row(name, by, f"{record.median:.1f}", f"{low:.1f}–{high:.1f}", record.unit)
    console.print(table)


def _samplers(threads: int, seconds: float) -> tuple[dict[str, Sampler], dict[str, str]]:
    """Return samplers of the processor and its memory, and the reasons for missing ones."""
    samplers: dict[str, Sampler] = {}
    errors: dict[str, str] = {}
    for precision in PEAKS:
        try:
            samplers |= peak_samplers([precision], seconds=seconds, threads=threads)
        except BabeltowerError as error:
            errors[precision] = str(error)
    for megabytes in READ_MB:
        parts = [np.ones((megabytes << 20) // 4 // threads, np.float32) for _ in range(threads)]
        run = _in_threads([part.max for part in parts])
        samplers[f"read {megabytes} MB"] = _sampler(run, (megabytes << 20) / 1e9, seconds, threads)
    pairs = [(np.empty(n, np.uint8), np.ones(n, np.uint8)) for n in [_COPIED_BYTES // threads] * threads]
    run = _in_threads([functools.partial(np.copyto, to, source) for to, source in pairs])
    samplers["copy"] = _sampler(run, 2 * _COPIED_BYTES / 1e9, seconds, threads)
    return samplers, errors


def _in_threads(runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Combine runs into one that does all at once; NumPy releases the GIL to read or copy."""
    if len(runs) == 1:
        return runs[0]
    pool = ThreadPoolExecutor(len(runs))
    return lambda: list(pool.map(lambda run: run(), runs))


def _cell(name: str, engine: str = "") -> dict[str, str]:
    """Return a cell whose ``precision`` names the peak: a precision, ``read N MB`` or ``copy``."""
    by_memory = name == "copy" or name.startswith("read")
    engine = engine or ("memory" if by_memory else "openvino")
    return suite_cell(suite="peaks", metric="rate", engine=engine, precision=name)


def _unit(name: str) -> str:
    return "GB/s" if name == "copy" or name.startswith("read") else "GOP/s"


def _sampler(run: Callable[[], Any], giga: float, seconds: float, threads: int) -> Sampler:
    run()
    clock = time.process_time if threads == 1 else time.perf_counter

    def sample() -> float:
        started, n = clock(), 0
        while clock() - started < seconds:
            run()
            n += 1
        return n * giga / (clock() - started)

    return sample


def _by_events(run: Callable[[], Any], giga: float) -> float:
    import torch

    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(10):
        run()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return 10 * giga / (milliseconds / 1e3)


def _product(precision: str, threads: int) -> Callable[[], Any]:
    """Chain products of ``_ROWS`` rows and constant weights, which makes reorders negligible."""
    import openvino
    from openvino import opset13 as op

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BabeltowerError("This processor does not compute in bf16: OpenVINO does not offer it.")
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
    properties = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    inputs = [random.random((_ROWS, _WIDTH), np.float32)]

    def run() -> None:
        request.infer(inputs, share_inputs=True, share_outputs=True)

    return run


def _fake(op: Any, value: Any, low: float, high: float, levels: int) -> Any:
    ends = [op.constant(np.float32(end)) for end in (low, high, low, high)]
    return op.fake_quantize(value, *ends, levels)


def main(
    threads: Annotated[int, typer.Option(min=1, help="Threads of a product and of reading memory.")] = 1,
    turns: Annotated[int, typer.Option(min=1)] = 7,
    record: Annotated[Path, typer.Option("--json", help="File of the records.")] = Path(
        "build/bench/peaks.json"
    ),
) -> None:
    """Measure this machine's peaks, print them and write the records."""
    records = measure_peaks(turns=turns, threads=threads)
    write_records(records, record)
    console = Console()
    print_peaks(records, console)
    console.print(f"records  {record}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
