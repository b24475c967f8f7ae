"""The measured tables of README.md and docs/: what the committed records give, and nothing else."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import readme_tables
from bench.readme_tables import RESULTS, ROOT, TABLES, app, pages, rendered, table_from_results
from bench.records.record import Record, record_of, suite_cell, write_records
from bench.reporting.record_tables import (
    corpus_table,
    costs_table,
    peer_errors_table,
    peers_table,
    portable_speed_table,
    precisions_table,
    rates_table,
    recall_table,
    server_table,
    simulated_table,
    speed_table,
    summary_table,
)
from bench.timing.speed_cells import cells_by_shape, verdicts_of_cells
from runtime.errors import BabeltowerError


def rows_of(table: str) -> list[list[str]]:
    """Cells of a Markdown table without its head, which all rows must be as wide as."""
    head, rule, *rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert rule == ["|".join(["---"] * len(head))]
    assert all(len(row) == len(head) for row in rows)
    return rows


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda path: path.name)
def test_pages_are_what_the_records_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == rendered(text, RESULTS), f"{page.name} is stale; run: python -m bench.readme_tables"


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("README.md", ["summary"]),
        (
            "docs/measured.md",
            ["recall", "precisions", "speed", "speed-avx2", "corpus", "peers", "server"],
        ),
    ],
)
def test_pages_mark_their_tables(page: str, names: Sequence[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"^<!-- table: ([\w-]+) -->$", text, re.MULTILINE) == names


# One page


PAGE = "# Title\n\n<!-- table: speed -->\nold\n<!-- end -->\n\nAs `<!-- table: x -->` says.\n"


def test_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    write_records(speeds(), tmp_path / "precision_speed.json")
    once = rendered(PAGE, tmp_path)
    begin, end = once.index("<!-- table: speed -->\n\n| tower |"), once.index("|\n\n<!-- end -->\n\nAs `")
    assert once[begin:end].endswith(speed_table(speeds()).rstrip("|\n"))
    assert rendered(once, tmp_path) == once


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table: speed -->\n|\n", r"speed --> has no <!-- end -->"),
        ("<!-- table: speed -->\n<!-- table: peers -->\n<!-- end -->\n", r"speed --> has no <!-- end -->"),
        ("<!-- table: spede -->\n<!-- end -->\n", r"There is no table 'spede'; there are \['corpus'"),
    ],
)
def test_a_mark_that_says_nothing_is_refused(page: str, message: str, tmp_path: Path) -> None:
    write_records(speeds(), tmp_path / "precision_speed.json")
    with pytest.raises(BabeltowerError, match=message):
        rendered(page, tmp_path)


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_record_is_named_with_its_command(name: str, tmp_path: Path) -> None:
    path = tmp_path / TABLES[name].record
    with pytest.raises(BabeltowerError, match="python -m bench") as error:
        table_from_results(name, tmp_path)
    assert f"{path}, which does not exist" in str(error.value)


def test_check_writes_nothing_and_fails_on_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(speeds(), tmp_path / "precision_speed.json")
    (tmp_path / "docs").mkdir()
    page, other = tmp_path / "README.md", tmp_path / "docs" / "other.md"
    page.write_text(PAGE)
    other.write_text("none here\n")
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    run = CliRunner()
    stale = run.invoke(app, ["--check"])
    assert (stale.exit_code, stale.stdout, page.read_text()) == (1, "stale  README.md\n", PAGE)
    written = run.invoke(app, [])
    assert (written.exit_code, written.stdout) == (0, "rendered  README.md\n")
    fresh = run.invoke(app, ["--check"])
    assert (fresh.exit_code, fresh.stdout) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "docs", "precision_speed.json"]


# Each table


def precisions() -> dict[str, Any]:
    def entry(exported: float) -> dict[str, Any]:
        recalls = {"reference": {"1": 0.3, "10": 0.6}, "exported": {"1": exported, "10": 0.5}}
        return {"cosine_min": 0.99, "text_to_image": recalls}

    languages = {"por_Latn": entry(0.2), "tha_Thai": entry(0.1)}
    found = {"languages": languages, "images": {"cosine_min": 0.5}}
    other = {"languages": {}, "images": {}}
    sides = {
        "text_to_image": {"mean_drop_points": -0.2, "worst_drop_points": 0.75},
        "image_to_text": {"mean_drop_points": -0.1, "worst_drop_points": 0.5},
    }
    lossy = {**sides, "image_to_text": {"mean_drop_points": 0.34, "worst_drop_points": 0.4}}
    return {
        "rows": [
            {"model": "zebra", "variant": "fp16", **sides},
            {"model": "altclip", "variant": "fp32", **sides},
            {"model": "altclip", "variant": "int8_openvino", **lossy},
            {"model": "nllb-clip", "variant": "fp16", **sides},
        ],
        "retrieval": {
            model: {"fp32": {"openvino 1": other, "onnxruntime 1": found}}
            for model in ("altclip", "nllb-clip")
        },
    }


def test_recall_is_the_mean_over_the_languages() -> None:
    cells = ["30.0 / 60.0", "15.0 / 50.0", "0.50000000"]
    assert rows_of(recall_table(precisions())) == [["`nllb-clip`", *cells], ["`altclip`", *cells]]


def test_precisions_show_the_worse_direction_and_gains_as_zero() -> None:
    portable = precisions()
    portable["rows"] = [{**portable["rows"][2], "variant": "int8_onnxruntime"}]
    assert rows_of(precisions_table(precisions(), portable)) == [
        ["`nllb-clip`", "0.00 / 0.75", "–", "–", "–"],
        ["`altclip`", "–", "–", "0.34 / 0.75", "0.34 / 0.75"],
        ["`zebra`", "0.00 / 0.75", "–", "–", "–"],
    ]


def speeds() -> list[Record]:
    """A tower of texts in all forms, one of images without NNCF; the machine is slowest in the last turn."""
    forms = {
        "torch fp32": 10.0,
        "openvino fp32": 12.5,
        "openvino bf16": 20.0,
        "onnxruntime int8": 30.0,
        "openvino int8": 40.0,
        "openvino int8 by NNCF": 32.0,
        "peak int8": 100.0,
    }
    records = []
    for tower, shape, rows, left_out in (
        ("XLM-R base", "8×16", 8, None),
        ("ViT-B/32", "8", 8, "openvino int8 by NNCF"),
    ):
        settings = {"rows": rows, "tokens": 16, "operations_per_run": rows * 10**9}
        for form, rate in forms.items():
            if form != left_out:
                cell = {"tower": tower, "shape": shape, "form": form}
                samples = [rate, 1.5 * rate, rate / 2]
                records.append(record_of(cell, samples, unit="rows/core-second", settings=settings))
    footprint = record_of({"tower": "XLM-R base", "footprint": "on disk"}, [1.0], unit="MB", settings={})
    return [*records, footprint]


def test_speed_is_a_ratio_within_the_turns() -> None:
    cells = ["–", "1.25", "2.00", "3.00", "4.00", "40%"]
    assert rows_of(speed_table(speeds())) == [
        ["XLM-R base", "8×16", *cells, "1.25"],
        ["ViT-B/32", "8", *cells, "–"],
    ]


def test_the_summary_has_losses_and_speeds_by_precision_and_engine() -> None:
    record, portable = precisions(), precisions()
    engines = {"fp16": "onnxruntime 1", "fp32": "openvino 2", "int8_openvino": "openvino 2"}
    record["rows"] = [{**row, "engine": engines[row["variant"]]} for row in record["rows"]]
    lossy = {**record["rows"][2], "variant": "int8_onnxruntime", "engine": "onnxruntime 1"}
    gaining = {**record["rows"][1], "variant": "int8_onnxruntime", "engine": "onnxruntime 1"}
    record["rows"].append(gaining)
    portable["rows"] = [lossy]
    none = ["–"] * 3
    assert rows_of(summary_table(record, portable, speeds())) == [
        ["FP32, ONNX Runtime", *none, *none],
        ["FP32, OpenVINO", "–", "–", "0.00 / 0.75", "–", "1.25", "1.25"],
        ["FP16, ONNX Runtime", "0.00 / 0.75", "–", "–", *none],
        ["BF16, OpenVINO", *none, "–", "2.00", "2.00"],
        ["INT8, ONNX Runtime", "–", "–", "0.34 / 0.75", "–", "3.00", "3.00"],
        ["INT8, OpenVINO", "–", "–", "0.34 / 0.75", "–", "4.00", "4.00"],
    ]


def test_speed_without_vnni_is_beside_onnx_runtime_s_own_fp32() -> None:
    records = [r for r in speeds() if not r.cell.get("form", "").startswith("openvino int8")]
    for tower, shape in (("XLM-R base", "8×16"), ("ViT-B/32", "8")):
        cell = {"tower": tower, "shape": shape, "form": "onnxruntime fp32"}
        settings = {"rows": 8, "tokens": 16, "operations_per_run": 8 * 10**9}
        records.append(record_of(cell, [15.0, 22.5, 7.5], unit="rows/core-second", settings=settings))
    cells = ["1.50", "1.25", "3.00", "2.00"]
    assert rows_of(portable_speed_table(records)) == [
        ["XLM-R base", "8×16", *cells],
        ["ViT-B/32", "8", *cells],
    ]
    (verdict,) = verdicts_of_cells("XLM-R base", cells_by_shape(records)["XLM-R base", "8×16"])
    assert verdict == ("int8 ≥ 1.75× fp32, both on ONNX Runtime", "2.00×", "onnxruntime int8", True)


def corpora() -> list[Record]:
    def cell(tower: str, corpus: str, way: str) -> dict[str, str]:
        model = "xlm-roberta-base-ViT-B-32"
        return {
            **suite_cell(suite="corpus", metric="rate", model=model, tower=tower),
            "corpus": corpus,
            "way": way,
        }

    rates: Sequence[tuple[str, str, str, list[float]]] = [
        ("text", "captions", "pipeline", [200.0, 250.0, 300.0]),
        ("text", "captions", "plain", [20.0, 50.0, 30.0]),
        ("text", "generated", "pipeline", [100.0]),
        ("image", "JPEG 640×480", "pipeline", [25.0]),
        ("image", "JPEG 640×480", "tower alone", [1234.0]),
        ("image", "JPEG 640×480", "preprocessing", [200.0]),
        ("image", "JPEG 640×480", "decoding, Pillow alone", [300.0]),
    ]
    records = [
        record_of(cell(*name), samples, unit="rows/core-second", settings={}) for *name, samples in rates
    ]
    failed = record_of(
        cell("text", "captions", "open_clip"), [], unit="rows/core-second", settings={}, error="no such model"
    )
    return [*records, failed]


def test_a_corpus_beside_the_loops() -> None:
    assert rows_of(corpus_table(corpora())) == [
        ["XLM-R base", "CLDR captions", "250", "10.0", "–", "–"],
        ["XLM-R base", "generated texts (9 words at the median)", "100", "–", "–", "–"],
        ["ViT-B/32", "JPEGs of 640×480", "25.0", "–", "–", "–"],
    ]


def test_what_a_core_does_and_what_a_billion_rows_cost() -> None:
    rows = rows_of(rates_table(corpora()))
    assert [row[1] for row in rows] == ["250", "100", "25.0", "1,230", "200"]
    assert rows[3] == [
        "ViT-B/32 INT8, the tower alone",
        "1,230",
        "`xlm-roberta-base-ViT-B-32`, JPEG 640×480, tower alone",
    ]
    assert rows_of(costs_table(corpora())) == [
        ["10⁹ generated texts, XLM-R base, 100 a core-second", "10.0 million", "2.8 hours", "$111"],
        ["10⁹ JPEGs of 640×480, ViT-B/32, 25.0 a core-second", "40.0 million", "11.1 hours", "$444"],
    ]


def test_a_corpus_by_stage_is_no_corpus_at_true_size() -> None:
    stage = record_of(suite_cell(suite="corpus", metric="rate"), [1.0], unit="rows/s", settings={})
    with pytest.raises(BabeltowerError, match="measure with --work FOLDER"):
        corpus_table([stage])


def test_a_server_beside_itself_unbatched_and_in_process() -> None:
    settings = {
        "clients": 32,
        "tower_average_batch": 3.25,
        "padding_share": 0.0807,
        "p50_ms": 19.3,
        "p99_ms": 47.6,
        "max_error": 1.2e-7,
    }
    records = [
        record_of(
            suite_cell(suite="server", metric="rate", model="m", by=by, engine="openvino", precision="int8"),
            samples,
            unit="rows/s",
            settings=settings,
        )
        for by, samples in (
            ("babeltower server", [1000.0, 2000.0, 1500.0]),
            ("babeltower server, unbatched", [500.0, 800.0, 750.0]),
            ("babeltower in process", [2000.0, 8000.0, 3000.0]),
            ("babeltower in process, as many at a time", [1000.0, 4000.0, 1000.0]),
        )
    ]
    rates = ["1,500", "750", "3,000", "1,000", "2.00", "50% / 100%"]
    (row,) = rows_of(server_table(records))
    assert row == ["`m`, OpenVINO INT8", *rates, "3.2", "8.1%", "19 / 48", "1e-7"]
    exact = [dataclasses.replace(record, settings={**settings, "max_error": 0.0}) for record in records]
    assert rows_of(server_table(exact))[0][-1] == "0"


def test_simulated_losses_are_the_worse_direction_s() -> None:
    def judged(model: str, form: str, direction: str, found: float, *, passes: bool = True) -> Record:
        drops = {"text_to_image": [0.004, "pt"], "image_to_text": [0.011, "gl"]}
        settings = {
            "reference": 0.25,
            "worst_drop": drops,
            "passes": passes,
            "text_cosine_min": 0.99991,
            "image_cosine_min": 0.99995,
        }
        cell = {"suite": "gate", "model": model, "form": form, "direction": direction}
        return record_of(cell, [found], unit="R@1", settings=settings)

    records = [
        judged("zebra", "simulated fp16", "text_to_image", 0.25, passes=False),
        judged("altclip", "simulated fp16", "text_to_image", 0.2512),
        judged("altclip", "simulated fp16", "image_to_text", 0.2491),
    ]
    assert rows_of(simulated_table(records)) == [
        ["`altclip`", "0.09 / 1.10", "0.999910"],
        ["`zebra`", "0.00 / 0.40, refused", "0.999910"],
    ]


def peer(by: str, precision: str, *samples: float, tokens: str = "16", error: str | None = None) -> Record:
    cell = suite_cell(
        suite="peers",
        metric="cpu",
        model="m",
        family="altclip",
        tower="text",
        by=by,
        engine="openvino",
        precision=precision,
        batch=8,
    )
    return record_of({**cell, "tokens": tokens}, samples, unit="ms", settings={}, error=error)


def test_the_best_peer_stands_at_each_precision_and_at_any() -> None:
    turns = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    records = [
        peer("babeltower", "fp32", *(4 * t for t in turns)),
        peer("babeltower", "int8", *turns),
        peer("Torch", "fp32", *(9 * t for t in turns)),
        peer("Faster", "fp32", *(6 * t for t in turns)),
        peer("NNCF", "int8", *(0.75 * t for t in turns)),
        peer("babeltower", "fp32", *turns, tokens="strings"),
        peer("Loop", "fp32", *reversed(turns), tokens="strings"),
        peer("Other", "fp32", tokens="strings", error="no | file\nat all"),
    ]
    prepared, whole = rows_of(peers_table(records))
    assert prepared == [
        "AltCLIP text, from 16 tokens",
        "8",
        "5,330, OpenVINO INT8",
        "1.50 (1.50–1.50) Faster",
        "–",
        "**0.75 (0.75–0.75), behind** NNCF",
        "**0.75 (0.75–0.75), behind** NNCF, INT8",
    ]
    assert whole[0] == "AltCLIP text, from strings"
    assert whole[3] == "**1.25 (0.50–2.00), even** Loop"
    assert whole[6] == "**1.25 (0.50–2.00), even** Loop, FP32"
    assert rows_of(peer_errors_table(records)) == [
        ["Other", "AltCLIP text, from strings", r"no \| file at all"]
    ]


def test_wrong_answers_of_a_peer_are_one_row_with_the_worst_cosine() -> None:
    errors = [f"something else: cosine {cosine}, expected at least 0.9" for cosine in ("0.25", "-0.111351")]
    records = [peer("Other", "fp32", tokens="strings", error=error) for error in errors]
    assert rows_of(peer_errors_table(records)) == [
        ["Other", "AltCLIP text, from strings", "something else: cosine -0.11, expected at least 0.9"]
    ]


@pytest.mark.parametrize("render", [speed_table, corpus_table, rates_table, costs_table])
def test_other_environments_are_refused(render: Any) -> None:
    records = corpora() if render in (corpus_table, rates_table, costs_table) else speeds()
    records[0] = dataclasses.replace(records[0], commit="f" * 40)
    with pytest.raises(BabeltowerError, match="different environments"):
        render(records)
