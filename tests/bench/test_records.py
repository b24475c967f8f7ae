"""Records of measurements: what they keep, what is derived, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from sample_models import ROOT

from bench.records.record import (
    Record,
    artefact_sha256,
    interval,
    read_records,
    record_of,
    records_to_keep,
    require_one_environment,
    suite_cell,
    write_records,
)
from runtime.errors import BabeltowerError


def record(**changes: object) -> Record:
    cell = {"tower": "ViT-B/32", "form": "openvino int8"}
    made = record_of(cell, [3.0, 1.0, 2.0], unit="rows/core-second", settings={"turns": 3})
    return dataclasses.replace(made, **changes)


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    written = [record(), record(artefact="ab" * 32)]
    write_records(written, tmp_path / "deep" / "cells.json")
    assert read_records(tmp_path / "deep" / "cells.json") == written
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["cells.json"]


def test_samples_stay_raw_and_the_median_is_derived() -> None:
    assert record().samples == (3.0, 1.0, 2.0)
    assert record().median == 2.0
    with pytest.raises(BabeltowerError, match="no samples"):
        record(samples=())


@pytest.mark.parametrize(
    ("n", "expected"), [(1, (0, 0)), (5, (0, 4)), (6, (0, 5)), (9, (1, 7)), (20, (5, 14))]
)
def test_interval_of_the_median(n: int, expected: tuple[int, int]) -> None:
    assert interval([float(n - 1 - i) for i in range(n)]) == expected


@pytest.mark.parametrize(
    "change", [{"commit": "other"}, {"machine": {"cpu": "another"}}, {"versions": {"numpy": "0"}}]
)
def test_records_of_two_environments_are_not_compared(change: dict) -> None:
    require_one_environment([record(), record()])
    with pytest.raises(BabeltowerError, match=next(iter(change))):
        require_one_environment([record(), record(**change)])


def test_the_hash_covers_every_file_in_order(tmp_path: Path) -> None:
    graph, data = tmp_path / "model.onnx", tmp_path / "model.data"
    graph.write_bytes(b"graph")
    data.write_bytes(b"data")
    assert artefact_sha256(graph, data) == hashlib.sha256(b"graphdata").hexdigest()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 3, "cells": []}', '{"schema": 2, "cells": [{}]}']
)
def test_what_holds_no_records_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "cells.json").write_text(text)
    with pytest.raises(BabeltowerError):
        read_records(tmp_path / "cells.json")


def test_a_cell_that_could_not_run_says_why(tmp_path: Path) -> None:
    missing = record(samples=(), error="ImportError: no module named peer")
    write_records([missing], tmp_path / "cells.json")
    assert read_records(tmp_path / "cells.json") == [missing]
    with pytest.raises(BabeltowerError, match="no module named peer"):
        _ = missing.median


@pytest.mark.parametrize(
    "change",
    [
        {"error": "failed"},
        {"samples": (), "error": ""},
        {"processes": (1, 1)},
        {"processes": (3, 0)},
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change: dict) -> None:
    with pytest.raises(BabeltowerError):
        record(**change)


def test_samples_are_known_by_process(tmp_path: Path) -> None:
    write_records([record(processes=(1, 2))], tmp_path / "cells.json")
    (read,) = read_records(tmp_path / "cells.json")
    assert read.by_process == ((3.0,), (1.0, 2.0))
    assert record().by_process == ((3.0, 1.0, 2.0),)


def test_the_first_schema_is_still_read(tmp_path: Path) -> None:
    cell = {k: v for k, v in dataclasses.asdict(record()).items() if k not in ("processes", "error")}
    (tmp_path / "cells.json").write_text(json.dumps({"schema": 1, "cells": [cell]}))
    assert read_records(tmp_path / "cells.json") == [record()]


def test_what_is_not_measured_anew_stays_if_it_is_comparable(tmp_path: Path) -> None:
    file, other = tmp_path / "cells.json", record(cell={"tower": "NLLB-600M", "form": "openvino int8"})
    assert records_to_keep(file, lambda old: False) == []
    write_records([record(), other], file)
    assert records_to_keep(file, lambda old: True) == []
    assert records_to_keep(file, lambda old: old.cell["tower"] == "ViT-B/32") == [other]
    write_records([record(), dataclasses.replace(other, commit="other")], file)
    assert records_to_keep(file, lambda old: old.cell["tower"] == "NLLB-600M") == [record()]
    with pytest.raises(BabeltowerError, match="commit"):
        records_to_keep(file, lambda old: old.cell["tower"] == "ViT-B/32")


def test_folders_and_files_are_read_together(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    write_records([record(unit="b")], folder / "b.json")
    write_records([record(unit="a")], folder / "a.json")
    (folder / "of_another_kind.json").write_text('{"schema": "something/1"}')
    write_records([record(unit="c")], tmp_path / "c.json")
    assert [r.unit for r in read_records(tmp_path / "c.json", folder)] == ["c", "a", "b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BabeltowerError, match="empty holds no file"):
        read_records(tmp_path / "empty")


def test_every_suite_cell_has_the_same_keys() -> None:
    cell = suite_cell(suite="latency", metric="cpu", model="nllb-clip", tower="text", batch=8, tokens=16)
    assert list(cell) == list(suite_cell(suite="peaks", metric="rate"))
    assert (cell["batch"], cell["tokens"], cell["by"]) == ("8", "16", "babeltower")
    with pytest.raises(BabeltowerError, match="latency"):
        suite_cell(suite="latencies", metric="cpu")


def test_what_is_written_fits_the_stated_schema(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    stated = json.loads((ROOT / "bench" / "records" / "record.schema.json").read_text())
    written = [record(processes=(1, 2)), record(samples=(), error="no such peer")]
    write_records(written, tmp_path / "cells.json")
    jsonschema.validate(json.loads((tmp_path / "cells.json").read_text()), stated)
    parts = {**stated, **stated["$defs"]["suite_cell"]}
    jsonschema.validate(suite_cell(suite="throughput", metric="rate", batch=8), parts)
    keys = stated["$defs"]["record"]["required"]
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(Record))
