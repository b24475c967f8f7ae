"""Table of web pages."""

from __future__ import annotations

from bench.records.record import record_of
from bench.reporting.web_table import web_table

FIGURES = {
    "tokens": 80_555.0,
    "model": 240_600_466.0,
    "fetched": 247_423_880.0,
    "largest file": 20_000_000.0,
    "ready": 29.2,
    "open": 3_510.9,
    "query": 203.8,
    "lowest cosine": 0.9997964,
}


def test_the_table_has_a_line_a_model_and_language_set() -> None:
    records = [
        record_of({"web": name, "model": "base", "languages": languages}, [value], unit="1", settings={})
        for languages in ("all", "por,eng")
        for name, value in FIGURES.items()
    ]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in web_table(records).splitlines()
    ]
    assert len(lines) == 4
    assert lines[3][:6] == ["`base`", "por,eng", "80,555", "240.6", "247.4", "20.0"]
    assert lines[3][6:] == ["29.2", "3.5", "204", "0.999796"]
    assert len({len(line) for line in lines}) == 1
