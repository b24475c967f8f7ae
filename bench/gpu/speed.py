"""Time all full-size towers: each is prepared in processes of its own, and timed while nothing else runs.

One process of a tower writes its graphs while another compiles it in PyTorch and then opens the sessions.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from contextlib import suppress

from bench.gpu.forms import forms_to_time, graph_for_gpu
from bench.gpu.lines import QUIET, Bench
from bench.gpu.towers import DRY_TOWERS, TOWERS, tower_of
from bench.gpu.turns import POLL_S, Turn
from runtime.manifest import Modality

__all__ = ["perform_part", "time_all", "write_graphs"]

_SHARE_TO_PREPARE = 0.55
_GRACE_S = 20.0
_OPENING_S = 25.0
_WITHOUT_COMPILER_S = 60.0


def time_all(bench: Bench) -> None:
    """Prepare all towers at once, then time one after another, in order of worth."""
    towers = DRY_TOWERS if bench.dry else TOWERS
    prepared_by = time.time() + bench.left_s * _SHARE_TO_PREPARE
    running: dict[str, subprocess.Popen[bytes]] = {}
    makers: list[subprocess.Popen[bytes]] = []
    for tower in towers:
        turn = Turn.of(bench, tower.slug)
        for file in (turn.graphs, turn.ready, turn.go):
            file.unlink(missing_ok=True)
        makers.append(subprocess.Popen(_command("--part", f"{tower.slug}/graphs")))
        until = prepared_by - _OPENING_S
        running[tower.slug] = subprocess.Popen(_command("--part", tower.slug, "--until", f"{until}"))
    _wait_until_ready(bench, running, prepared_by + _GRACE_S)
    for slug, process in running.items():
        if _is_preparing(bench, slug, process):
            process.kill()  # a compilation that would go on while others are timed
            bench.emit(step="speed", tower=slug, error="not ready in time; PyTorch's compiler is left out")
            running[slug] = subprocess.Popen(_command("--part", slug, "--until", "0"))
            prepared_by = time.time() + _WITHOUT_COMPILER_S
    _wait_until_ready(bench, running, prepared_by)
    while not (bench.work / QUIET).exists() and bench.left_s > 0:
        time.sleep(POLL_S)
    bench.emit(step="quiet", left_s=bench.left_s)
    for n_before, (slug, process) in enumerate(running.items()):
        Turn.of(bench, slug).begin(time.time() + bench.left_s / (len(running) - n_before))
        try:
            if code := process.wait(timeout=max(1.0, bench.left_s)):
                bench.emit(step="speed", tower=slug, error=f"ended with exit code {code}")
        except subprocess.TimeoutExpired:
            bench.emit(step="speed", tower=slug, error="out of time")
    for process in (*running.values(), *makers):
        if process.poll() is None:
            process.kill()
    shutil.rmtree(bench.graphs, ignore_errors=True)


def _wait_until_ready(bench: Bench, running: dict[str, subprocess.Popen[bytes]], end: float) -> None:
    while time.time() < end and any(_is_preparing(bench, *item) for item in running.items()):
        time.sleep(POLL_S)


def perform_part(bench: Bench, part: str, until: float) -> None:
    """Write the graphs of ``SLUG/graphs``, or prepare and time ``SLUG``."""
    slug, _, graphs = part.partition("/")
    if graphs:
        write_graphs(bench, slug)
    else:
        from bench.gpu.tower_times import prepare_and_time  # PyTorch takes seconds to import

        prepare_and_time(bench, slug, until=until)


def write_graphs(bench: Bench, slug: str) -> None:
    """Write one tower's graphs in every form; one that cannot be written fails again when it is opened."""
    tower = tower_of(slug)
    try:
        for form in forms_to_time(dry=bench.dry):
            if form.texts_only and tower.modality is not Modality.TEXT:
                continue
            started = time.perf_counter()
            with suppress(Exception):
                graph_for_gpu(bench.skeleton(slug), form, bench.graphs)
            what = f"{form.by} {form.precision.value}"
            bench.emit(step="graph", tower=tower.name, what=what, seconds=time.perf_counter() - started)
    finally:
        Turn.of(bench, slug).graphs.touch()


def _command(*part: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu", *sys.argv[1:], *part]


def _is_preparing(bench: Bench, slug: str, process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None and not Turn.of(bench, slug).ready.exists()
