"""Processor, cores and the instruction sets that determine how matrix products are computed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = [
    "INSTRUCTION_SETS",
    "available_memory_bytes",
    "cpu_model",
    "has_vnni",
    "instruction_sets",
    "is_x86",
    "machine_facts",
    "machine_in_words",
    "n_cores",
    "peak_memory_bytes",
    "return_free_memory",
]

INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""Names as in Linux's ``/proc/cpuinfo``; engines choose their kernels by these."""

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_DARWIN = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16", "AVX2": "avx2", "FMA": "fma"}


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int | None:
    """Memory that can be taken without swapping; ``None`` where the system does not say.

    Source:
        ``MemAvailable`` of Linux's ``/proc/meminfo``.
    """
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else 1024 * int(kilobytes)


def peak_memory_bytes() -> int:
    """Return the most memory that this process had resident.

    Source:
        ``VmHWM`` of Linux's ``/proc/self/status``: ``getrusage``, which other systems have only, keeps the
        size of the process that started this one.
    """
    try:
        lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kilobytes = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    if kilobytes is not None:
        return 1024 * int(kilobytes)
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def return_free_memory() -> None:
    """Return freed memory to the system: glibc keeps it, for each thread that ever allocated.

    Takes a few milliseconds. Without glibc, nothing is done.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def is_x86() -> bool:
    """Check whether this machine is x86-64."""
    return platform.machine().lower() in ("x86_64", "amd64")


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """Return the processor's model name, or the architecture if it is unknown."""
    return _cpuinfo_field(("model name",)) or platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def instruction_sets() -> tuple[str, ...]:
    """Return the members of ``INSTRUCTION_SETS`` that this processor has, in order; empty if unknown.

    Source:
        ``/proc/cpuinfo`` on Linux, ``sysctl`` on macOS. Other systems are not queried: there, the opening
        check alone decides whether a model runs correctly.
    """
    is_macos = platform.system() == "Darwin"
    found = _darwin() if is_macos else _cpuinfo_field(("flags", "Features")).split()
    return tuple(name for name in INSTRUCTION_SETS if name in found)


def has_vnni() -> bool | None:
    """Check whether this x86 processor sums u8 × s8 products in 32 bits.

    Without VNNI, engines use an instruction whose sums saturate at 16 bits.

    Returns:
        ``None`` if the instruction sets are unknown.
    """
    found = instruction_sets()
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(found) if found else None


def machine_in_words() -> str:
    """Describe the processor and its instruction sets for messages: ``AMD EPYC (avx2, fma)``."""
    return f"{cpu_model()} ({', '.join(instruction_sets()) or 'instruction sets unknown'})"


def machine_facts() -> dict[str, Any]:
    """Return the processor and instruction sets as plain values, for records of measurements."""
    return {"cpu": cpu_model(), "instruction_sets": list(instruction_sets())}


def _cpuinfo_field(names: tuple[str, ...]) -> str:
    """Return the first value of a field of ``/proc/cpuinfo``; empty if there is none."""
    if not _CPUINFO.is_file():
        return ""
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _darwin() -> set[str]:
    try:
        listed = subprocess.run(
            ["sysctl", "-a"], capture_output=True, text=True, check=False, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return set()
    found = set()
    for line in listed.splitlines():
        name, _, value = line.partition(":")
        if name.startswith("hw.optional.arm.") and value.strip() == "1":
            found.add(_DARWIN.get(name.rpartition(".")[2], ""))
        elif name in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
            found.update(_DARWIN.get(word, "") for word in value.split())
    return found - {""}
