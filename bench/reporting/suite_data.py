"""Benchmark results of a folder, sorted by kind and, for records, by environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.records.record import Record, read_records
from runtime.errors import BabeltowerError

__all__ = ["Results", "Run", "results_from_paths"]

_TURNED = "babeltower-turned/1"
_PRECISIONS = "babeltower-precisions/1"
_RETRIEVAL = "babeltower-retrieval/1"


@dataclass(frozen=True, slots=True)
class Run:
    """Records of one machine, one set of packages and one commit."""

    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """One-line description."""
        machine, commit = self.records[0].machine, self.records[0].commit or "no commit"
        dirty = " with changes" if commit.endswith("-dirty") else ""
        return (
            f"{machine['cpu']}, {machine['n_cores']} of {machine['n_cores_of_machine']} cores, "
            f"{machine['system']}, commit {commit[:10]}{dirty}"
        )

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the packages."""
        return self.records[0].versions

    def of(self, suite: str) -> list[Record]:
        """Return the records of one suite."""
        return [record for record in self.records if record.cell.get("suite") == suite]


@dataclass(frozen=True, slots=True)
class Results:
    """All results, in the order of the files' names."""

    runs: tuple[Run, ...] = ()
    precisions: tuple[Mapping[str, Any], ...] = ()
    retrieval: tuple[Mapping[str, Any], ...] = ()
    turned: tuple[Mapping[str, Any], ...] = ()
    sensitivity: tuple[Mapping[str, Any], ...] = ()
    files: tuple[str, ...] = field(default=())


def results_from_paths(paths: Sequence[Path]) -> Results:
    """Read files and folders; JSON files of kinds that the page does not show are ignored.

    Raises:
        BabeltowerError: a file is broken, or nothing is found.
    """
    groups: dict[str, list[Record]] = {}
    found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in ("p", "r", "t", "s")}
    files = []
    for path in _json_files(paths):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BabeltowerError(f"{path} is not JSON ({error}); measure again.") from error
        kind = _kind(data)
        if kind is None:
            continue
        files.append(path.name)
        if kind != "records":
            found[kind].append(data)
            continue
        for record in read_records(path):
            key = json.dumps([record.machine, record.versions, record.commit], sort_keys=True)
            groups.setdefault(key, []).append(record)
    if not files:
        raise BabeltowerError(
            f"No benchmark results in {', '.join(map(str, paths))}; run 'make bench', or pass folders that "
            "have some."
        )
    return Results(
        runs=tuple(Run(tuple(records)) for records in groups.values()),
        precisions=tuple(found["p"]),
        retrieval=tuple(found["r"]),
        turned=tuple(found["t"]),
        sensitivity=tuple(found["s"]),
        files=tuple(files),
    )


def _json_files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(path.glob("*.json")) if path.is_dir() else [path]


def _kind(data: Any) -> str | None:
    if not isinstance(data, dict):
        return None
    schema = data.get("schema")
    if isinstance(schema, int) and "cells" in data:
        return "records"
    if {"products", "trials", "max_recall_drop"} <= data.keys():
        return "s"
    return {_PRECISIONS: "p", _RETRIEVAL: "r", _TURNED: "t"}.get(str(schema))
