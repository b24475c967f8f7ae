"""Records of measurements: what they keep, what is derived, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from bench.records import (
    Record,
    artefact_sha256,
    interval,
    read_records,
    record_of,
    require_one_environment,
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


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2, "cells": []}', '{"schema": 1, "cells": [{}]}'])
def test_what_holds_no_records_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "cells.json").write_text(text)
    with pytest.raises(BabeltowerError):
        read_records(tmp_path / "cells.json")
