"""The page of all results: what it shows, what it says where records are missing, that it stands alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation
from sample_models import ROOT
from typer.testing import CliRunner

from bench.records.record import Record, record_of, suite_cell, write_records
from bench.report import app
from bench.reporting.changed_hits import turned_path, write_turned
from bench.reporting.languages import language_rows, tiles_by_script
from bench.reporting.suite_data import results_from_paths
from bench.reporting.suite_page import page_from_results
from export.retrieval.verdict import RetrievalLimits
from runtime.errors import BabeltowerError
from runtime.preprocessing.languages import languages

RESULTS = ROOT / "bench" / "results"


def latencies(*, model: str = "m") -> list[Record]:
    records = []
    for tower in ("text", "image"):
        for precision, factor in (("fp32", 4.0), ("int8", 1.0)):
            for batch in (1, 8):
                cell = suite_cell(
                    suite="latency",
                    metric="wall",
                    model=model,
                    family="nllb-clip",
                    tower=tower,
                    engine="openvino",
                    precision=precision,
                    batch=batch,
                    tokens=16 if tower == "text" else None,
                )
                n = {precision: 10**9 * batch}
                settings = {
                    "threads": 1,
                    "operations_per_run": 10**9 * batch,
                    "operations_by_precision": n,
                    "bytes_per_run": 10**7,
                    "min_cosine": 1.0,
                }
                samples = [factor * batch * (1 + i / 100) for i in range(8)]
                records.append(record_of(cell, samples, unit="ms", settings=settings))
    return records


def peaks() -> list[Record]:
    settings = {"threads": 1}
    rates = {"fp32": 100.0, "int8": 400.0, "read 1 MB": 80.0, "read 256 MB": 30.0}
    return [
        record_of(
            suite_cell(suite="peaks", metric="rate", engine="openvino", precision=name),
            [rate] * 3,
            unit="GOP/s",
            settings=settings,
        )
        for name, rate in rates.items()
    ]


def served() -> list[Record]:
    cells = []
    for i, share in enumerate((25, 50, 75)):
        cell = suite_cell(suite="server", metric="wall", model="m", tower="text", load=f"open {share}%")
        values = [float(1 + i + k) for k in range(20)]
        cells.append(record_of(cell, values, unit="ms", settings={"offered_per_s": 100.0 * share}))
    rate = suite_cell(suite="throughput", metric="rate", model="m", tower="text", load="2×1")
    return [*cells, record_of(rate, [900.0, 910.0, 905.0], unit="rows/s", settings={})]


def precisions() -> dict[str, Any]:
    def entry(drop: float) -> dict[str, Any]:
        side = {
            "reference": {"1": 0.5, "5": 0.7, "10": 0.8},
            "exported": {"1": 0.5 - drop, "5": 0.7, "10": 0.8},
            "top10_overlap": 0.9,
        }
        return {"cosine_min": 0.95, "text_to_image": side, "image_to_text": side}

    drops = {"por_Latn": 0.001, "tha_Thai": 0.02, "eng_Latn": 0.0}
    side = {"mean_drop_points": 0.7, "worst_drop_points": 2.0, "worst_language": "tha_Thai"}
    row = {"model": "m", "variant": "int8_openvino", "engine": "openvino 1", "text_to_image": side}
    languages = {code: entry(drop) for code, drop in drops.items()}
    return {
        "schema": "babeltower-precisions/1",
        "rows": [{**row, "image_to_text": side}],
        "limits": {"int8": {"retrieval": {"max_mean_drop": 0.005, "max_recall_drop": 0.015}}},
        "retrieval": {"m": {"int8_openvino": {"openvino 1": {"languages": languages}}}},
    }


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    write_records([*peaks(), *latencies(), *served()], folder / "speed.json")
    (folder / "precisions.json").write_text(json.dumps(precisions()))
    done = evaluation(noise=0.5, limits=RetrievalLimits(0.9, 0.0, 0.2, 0.2, 0.2, 2e-6))
    (folder / "retrieval.json").write_text(done.report.to_json())
    assert write_turned(folder / "retrieval.json", done) == turned_path(folder / "retrieval.json")
    return folder


def page_of(*paths: Path) -> str:
    return page_from_results(results_from_paths(paths))


def require_self_contained(page: str) -> None:
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", page)
    assert not re.search(r"@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r">\s*(?:nan|None|inf)\b", page)


def test_everything_is_shown(everything: Path) -> None:
    page = page_of(everything)
    require_self_contained(page)
    for wanted in (
        'aria-label="Latency of m"',
        'aria-label="Roofline"',
        'aria-label="Throughput of m"',
        'aria-label="Latency against load of m"',
        "rows in a batch",
        "median, ms a batch",
        "operations a byte",
        "arrivals a second",
        "points of R@1 lost to PyTorch",
        "0.70 in the mean, 2.00 in tha_Thai",
        "the right picture is number",
    ):
        assert wanted in page
    assert page.count('<td class="no">') == page.count('class="no"') >= 1
    assert page.count("<svg ") == page.count("<figure>")


def test_languages_are_worst_first_and_tiles_stand_under_their_script() -> None:
    rows = language_rows([precisions()])
    assert [row.code for row in rows] == ["tha_Thai", "por_Latn", "eng_Latn"]
    assert rows[0].worst_drop == pytest.approx(2.0)
    assert rows[0].worst.startswith("m int8_openvino")
    tiles = tiles_by_script(rows)
    assert list(tiles) == ["Latin", "Scripts of one language each"]
    assert [(tile.code, tile.level) for tile in tiles["Latin"]] == [("eng_Latn", 0), ("por_Latn", 0)]
    assert tiles["Scripts of one language each"][0].level == 3


def test_every_script_has_a_readable_label() -> None:
    scripts = {language.flores.rpartition("_")[2] for language in languages()}
    assert len(scripts) > 30
    one = language_rows([precisions()])[0]
    rows = [dataclasses.replace(one, code=f"{x}_{script}") for script in scripts for x in ("aaa", "bbb")]
    labels = tiles_by_script(rows)
    assert len(labels) == len(scripts)
    assert not labels.keys() & (scripts - {"Thai"})
    assert [tile.code for tile in labels["Myanmar"]] == ["aaa_Mymr", "bbb_Mymr"]


def test_what_is_missing_names_its_command(tmp_path: Path) -> None:
    write_records(latencies(), tmp_path / "latency.json")
    page = page_of(tmp_path)
    require_self_contained(page)
    for command in (
        "bench/throughput.py",
        "bench.peers",
        "bench.precisions",
        "bench.precision_speed",
        "bench/retrieval.py",
    ):
        assert command in page
    assert "bench/latency.py" not in page


def test_runs_of_other_commits_stand_in_sections_of_their_own(tmp_path: Path) -> None:
    records = latencies()
    write_records(records, tmp_path / "a.json")
    other = [dataclasses.replace(record, commit="f" * 40) for record in latencies(model="n")]
    write_records(other, tmp_path / "b.json")
    sections = page_of(tmp_path).split("<h2>Measured on ")[1:]
    assert len(sections) == 2
    assert ["Latency of m" in section for section in sections] == [True, False]
    assert ["Latency of n" in section for section in sections] == [False, True]
    assert "commit ffffffffff" in sections[1]


def test_a_folder_without_results_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BabeltowerError, match="make bench"):
        results_from_paths([tmp_path])
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(BabeltowerError, match="not JSON"):
        results_from_paths([tmp_path])


def test_nothing_is_kept_where_nothing_turned(tmp_path: Path) -> None:
    record = tmp_path / "retrieval.json"
    turned_path(record).write_text("{}")
    assert write_turned(record, evaluation()) is None
    assert not turned_path(record).exists()


def test_the_committed_results_make_a_page(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(RESULTS), "--out", str(tmp_path / "index.html")])
    assert result.exit_code == 0, result.output
    require_self_contained((tmp_path / "index.html").read_text())


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_a_browser_finds_no_error_and_sorts(everything: Path, tmp_path: Path) -> None:
    page = page_of(everything) + "<script>document.querySelector('table.sortable th button').click()</script>"
    (tmp_path / "page.html").write_text(page)
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    first = re.search(r'<table class="sortable">.*?<tbody>\s*<tr><th>(\w+)', done.stdout, re.S)
    assert first is not None
    assert first.group(1) == "English"
