"""Turn the lines of a run into a file of records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.gpu.lines import LINES, RECORD, read_lines
from bench.records.record import Record, record_of, suite_cell, write_records
from runtime.errors import BabeltowerError

__all__ = ["records_from_lines", "records_of_line", "write_record"]


def write_record(bundle: Path, out: Path) -> None:
    """Write ``OUT/gpu.json`` from ``OUT/gpu.jsonl``, with this machine's environment."""
    facts = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    lines = list(read_lines(out / LINES))
    write_records(records_from_lines(lines, commit=facts["commit"]), out / RECORD)


def records_from_lines(lines: list[dict[str, Any]], *, commit: str | None) -> list[Record]:
    """Return a record per peak, per contender, shape and metric, and per judged form.

    Raises:
        BabeltowerError: the run did not get as far as describing its machine.
    """
    found = [line for line in lines if line.get("step") == "machine" and "gpu" in line]
    if not found:
        raise BabeltowerError(
            "The run wrote no line about its machine, so nothing can be recorded; run it again."
        )
    card = found[-1]
    records = [record for line in lines for record in records_of_line(line)]
    machine = {"gpu": card["gpu"], "driver": card["driver"], "capability": card["capability"]}
    versions = {"cuda": card["cuda"] or "", "torch": card["torch"], "onnxruntime": card["onnxruntime"]}
    return [
        replace(
            record,
            machine={**record.machine, **machine},
            versions={**record.versions, **versions},
            commit=commit,
        )
        for record in records
    ]


def records_of_line(line: Mapping[str, Any]) -> Iterator[Record]:
    """Return a line's records: those of a peak, of a contender or of a judged form; none of another line."""
    match line.get("step"):
        case "peak":
            cell = suite_cell(suite="peaks", metric="rate", engine="cuda", precision=line["name"])
            yield record_of(
                cell, line.get("samples", ()), unit=line["unit"], settings={}, error=line.get("error")
            )
        case "speed" if "samples" in line:
            for metric, samples in line["samples"].items():
                yield record_of(_speed_cell(line, metric), samples, unit="ms", settings=_settings(line))
        case "gate" if "mean_recall_at_1" in line:
            for direction, (reference, found) in line["mean_recall_at_1"].items():
                cell = {"suite": "gate", "model": line["model"], "form": line["form"], "direction": direction}
                settings = {key: line[key] for key in _GATE_SETTINGS} | {"reference": reference}
                yield record_of(cell, [found], unit="R@1", settings=settings)


_GATE_SETTINGS = (
    "languages",
    "passes",
    "faults",
    "worst_drop",
    "recall_at_1",
    "image_cosine_min",
    "text_cosine_min",
)


def _speed_cell(line: Mapping[str, Any], metric: str) -> dict[str, str]:
    return suite_cell(
        suite="gpu",
        metric=metric,
        model=line["tower"],
        tower=line["modality"],
        by=line["by"],
        engine=line["engine"],
        precision=line["precision"],
        batch=line["rows"],
        tokens=line["tokens"] or None,
        load=line["load"],
    )


def _settings(line: Mapping[str, Any]) -> dict[str, Any]:
    detail = {key: value for key, value in line["detail"].items() if value is not None}
    names = ("operations", "product_weights", "unit_vectors", "n_tokens")
    return {**{name: line[name] for name in names if name in line}, **detail}
