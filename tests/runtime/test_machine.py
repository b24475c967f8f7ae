"""Facts of the machine: read from the system, never guessed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime import machine

_X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse2 avx2 fma {extra}\n"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _forget()
    yield
    _forget()


def _forget() -> None:
    machine.cpu_model.cache_clear()
    machine.instruction_sets.cache_clear()


def _with_cpuinfo(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    path = folder / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(machine, "_CPUINFO", path)
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")


@pytest.mark.parametrize(
    ("extra", "vnni"), [("", False), ("avx512_vnni", True), ("avx_vnni", True), ("amx_int8", True)]
)
def test_vnni_is_told_from_the_flags(
    extra: str, vnni: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _with_cpuinfo(monkeypatch, tmp_path, _X86.format(extra=extra))
    assert machine.has_vnni() is vnni
    assert machine.cpu_model() == "Some CPU"
    assert machine.machine_in_words().startswith("Some CPU (avx2, fma")


def test_arm_features_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _with_cpuinfo(monkeypatch, tmp_path, "processor : 0\nFeatures : fp asimd asimddp i8mm\n")
    assert machine.instruction_sets() == ("asimddp", "i8mm")


def test_a_silent_system_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _with_cpuinfo(monkeypatch, tmp_path, "")
    assert machine.instruction_sets() == ()
    assert machine.has_vnni() is None
    assert "unknown" in machine.machine_in_words()


def test_macos_is_asked_by_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        stdout = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.ncpu: 8\n"

    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: Done())
    assert machine.instruction_sets() == ("asimddp",)


def test_peak_memory_is_this_processs_own():
    """``getrusage`` would keep the size of the process that started it."""
    program = "from runtime.machine import peak_memory_bytes; print(peak_memory_bytes())"
    ballast = np.ones(400 << 17)  # 400 MiB
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < ballast.nbytes
    assert machine.peak_memory_bytes() > ballast.nbytes


@pytest.mark.parametrize("library", [object(), None], ids=["another C library", "this one"])
def test_free_memory_is_returned_where_the_library_can(monkeypatch, library):
    calls = []
    if library is not None:
        monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: calls.append(name) or library)
    machine.return_free_memory()
    assert calls == ([] if library is None else [None])
