"""The whole set: its steps, how it fails; and whether two runs agree."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sample_models import ROOT
from typer.testing import CliRunner

from bench.records.record import Record, record_of, suite_cell, write_records
from bench.repeatability import agreements, app
from bench.run import Step, run_steps, steps_into
from runtime.errors import BabeltowerError

QUIET = Console(quiet=True)


def written(path: Path, *records: Record) -> tuple[str, ...]:
    write_records(records, path.with_suffix(".source"))
    return ("-c", f"import shutil; shutil.copy({str(path.with_suffix('.source'))!r}, {str(path)!r})")


def run_of(seed: int, *, scale: float = 1.0, n_cells: int = 20) -> list[Record]:
    """Cells of five processes that differ by 2%."""
    random = np.random.default_rng(seed)
    found = []
    for batch in range(1, n_cells + 1):
        levels = np.exp(0.02 * random.standard_normal(5))
        samples = [scale * level * x for level in levels for x in np.exp(0.03 * random.standard_normal(12))]
        cell = suite_cell(suite="latency", metric="cpu", model="m", batch=batch)
        found.append(record_of(cell, samples, unit="ms", settings={}, processes=[12] * 5))
    return found


def test_a_step_must_leave_its_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = Step("good", written(path, *run_of(0)), path)
    assert [(o.name, o.fault) for o in run_steps([good], QUIET)] == [("good", "")]
    (stale,) = run_steps([Step("stale", ("-c", "pass"), path)], QUIET)
    assert "a.json holds no benchmark records" in stale.fault


def test_a_step_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    steps = [
        Step("bad", ("-c", "raise SystemExit(3)"), None),
        Step("after", ("-c", f"open({str(marker)!r}, 'w')"), None),
    ]
    bad, after = run_steps(steps, QUIET)
    assert "exit code 3" in bad.fault
    assert after.fault == ""
    assert marker.exists()


def test_every_step_is_a_module_that_is_there(tmp_path: Path) -> None:
    steps = steps_into(tmp_path)
    assert [step.name for step in steps][:6] == [
        "peaks",
        "latency",
        "throughput",
        "retrieval",
        "retrieval in INT8",
        "corpus",
    ]
    for step in steps:
        assert step.arguments[0] == "-m"
        module = ROOT / step.arguments[1].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        if step.records is not None:
            assert str(step.records) in step.arguments


def test_two_runs_of_the_same_agree_and_a_slower_one_does_not() -> None:
    same = agreements(run_of(0, n_cells=40), run_of(1, n_cells=40))
    assert np.mean([cell.overlaps for cell in same]) >= 0.95
    assert np.mean([cell.holds_one for cell in same]) >= 0.85
    slower = agreements(run_of(0), run_of(1, scale=1.3))
    assert not any(cell.holds_one for cell in slower)
    assert np.median([cell.ratio for cell in slower]) == pytest.approx(1.3, rel=0.05)


def test_of_peers_the_stated_ratios_are_compared() -> None:
    """A machine that is slower for everybody changes no ratio."""

    def peers(own: float, torch: float) -> list[Record]:
        return [
            record_of(
                suite_cell(suite="peers", metric="cpu", model="m", by=by, engine=by, precision="fp32"),
                [level * x for x in (1.0, 1.01, 0.99, 1.02, 1.0, 0.98, 1.0)],
                unit="ms",
                settings={},
            )
            for by, level in (("babeltower", own), ("torch", torch))
        ]

    assert all(cell.overlaps for cell in agreements(peers(1, 2), peers(3, 6)))
    moved = agreements(peers(1, 2), peers(1, 3))
    assert [cell.overlaps for cell in moved] == [False, False]  # at fp32, and at any precision
    assert moved[0].ratio == pytest.approx(1.5)


def test_only_what_both_measured_in_one_environment_is_held_together() -> None:
    first, second = run_of(0, n_cells=2), run_of(1, n_cells=3)
    failed = replace(second[0], samples=(), processes=(), error="no such engine")
    assert len(agreements(first, [failed, *second[1:]])) == 1
    with pytest.raises(BabeltowerError, match="share no measured cell"):
        agreements(first[:1], second[1:])
    with pytest.raises(BabeltowerError, match="different environments"):
        agreements(first, [replace(record, machine={"cpu": "another"}) for record in second])


@pytest.mark.parametrize(("scale", "code"), [(1.0, 0), (1.5, 1)])
def test_the_command_tells_by_its_exit_code(scale: float, code: int, tmp_path: Path) -> None:
    write_records(run_of(0), tmp_path / "a.json")
    write_records(run_of(1, scale=scale), tmp_path / "b.json")
    done = CliRunner().invoke(app, [str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert done.exit_code == code, done.output
    assert "latency" in done.output


SCRIPTS = sorted(
    path.stem for path in (ROOT / "bench").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_starts_from_any_folder(script: str, tmp_path: Path) -> None:
    """By its path: with bench/ itself on the path, its rooms would stand for libraries of their names."""
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, str(ROOT / "bench" / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    if script in ("latency", "throughput", "retrieval", "corpus", "peaks"):
        assert "--json" in done.stdout


def test_every_module_with_a_command_is_at_the_top_or_says_how_to_run_it() -> None:
    below = [
        path
        for path in (ROOT / "bench").rglob("*.py")
        if path.parent != ROOT / "bench"
        and "isolated" not in path.parts
        and '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    for path in below:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        assert f"python -m {module}" in path.read_text(encoding="utf-8"), module
