"""First step: the card, its peaks, and how fast memory is copied."""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.lines import Bench

__all__ = ["measure_machine"]

_SIDE = 8_192
_TURNS = 5
_COPIED_BYTES = 1 << 30
_HOST_BYTES = 64 << 20


def measure_machine(bench: Bench) -> None:
    """Write the card's facts and peaks; without a GPU, only that there is none."""
    import onnxruntime

    gpu = torch.cuda.is_available()
    bench.emit(
        step="machine",
        gpu=torch.cuda.get_device_name() if gpu else "none",
        capability=list(torch.cuda.get_device_capability()) if gpu else None,
        driver=_driver() if gpu else "",
        cuda=torch.version.cuda,
        torch=torch.__version__,
        onnxruntime=onnxruntime.__version__,
        providers=onnxruntime.get_available_providers(),
        smi=_smi() if gpu else "",
    )
    side = _SIDE if gpu else 64
    device = "cuda" if gpu else "cpu"
    operations = 2 * side**3 / 1e9
    for name, run in _products(side, device).items():
        _emit_peak(bench, name, "GOP/s", operations, run)
    for name, giga, run in _copies(device):
        _emit_peak(bench, name, "GB/s", giga, run)


def _products(side: int, device: str) -> dict[str, Callable[[], Any]]:
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Callable[[], Any]] = {}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[name] = functools.partial(torch.matmul, x, y)
    if device == "cuda":
        one = torch.ones((), device=device)
        x8 = torch.randn(side, side, device=device).to(torch.float8_e4m3fn)
        y8 = torch.randn(side, side, device=device).to(torch.float8_e4m3fn).t()
        found["fp8"] = lambda: torch._scaled_mm(x8, y8, one, one, out_dtype=torch.bfloat16)
    return found


def _copies(device: str) -> list[tuple[str, float, Callable[[], Any]]]:
    """List name, gigabytes read and written (of the device's own copy), and the copy."""
    n_bytes, n_host = (_COPIED_BYTES, _HOST_BYTES) if device == "cuda" else (1 << 20, 1 << 20)
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    pageable = torch.randint(0, 255, (n_host,), dtype=torch.uint8)
    pinned = pageable.pin_memory() if device == "cuda" else pageable
    part = target[:n_host]
    giga = n_host / 1e9
    return [
        ("copy", 2 * n_bytes / 1e9, lambda: target.copy_(source)),
        ("copy to device, pinned", giga, lambda: part.copy_(pinned, non_blocking=True)),
        ("copy to device, pageable", giga, lambda: part.copy_(pageable)),
        ("copy to host, pinned", giga, lambda: pinned.copy_(part, non_blocking=True)),
        ("copy to host, pageable", giga, lambda: pageable.copy_(part)),
    ]


def _emit_peak(bench: Bench, name: str, unit: str, giga: float, run: Callable[[], Any]) -> None:
    try:
        run()
        samples = [_rate(run, giga) for _ in range(_TURNS)]
    except RuntimeError as error:
        bench.emit(step="peak", name=name, unit=unit, error=str(error)[:300])
        return
    bench.emit(step="peak", name=name, unit=unit, samples=samples)


def _rate(run: Callable[[], Any], giga: float, n: int = 8) -> float:
    _wait()
    started = time.perf_counter()
    for _ in range(n):
        run()
    _wait()
    return n * giga / (time.perf_counter() - started)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _smi() -> str:
    return subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout[-2_000:]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
