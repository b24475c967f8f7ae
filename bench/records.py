"""One record a measured cell: raw samples, unit, and all that a figure depends on.

The format of every file under ``bench/results/``, schema 1: a JSON object of

- ``schema``: 1;
- ``cells``: a list of objects, each
    - ``cell``: what was measured, by name (``{"tower": …, "engine": …, "precision": …, "shape": …}``);
    - ``unit``: of the samples (``rows/core-second``, ``GOP/s``, ``bytes``, …);
    - ``samples``: every measured number, in the order of measuring; never a mean of them;
    - ``settings``: what was chosen (threads, turns, seconds a turn, …);
    - ``artefact``: sha256 of the measured file and its data, ``null`` where there is none;
    - ``machine``: processor, instruction sets, governor, cores, system;
    - ``versions``: of the packages and of Python; ``commit``: of the source tree.

Statistics are derived when records are read: none is stored. Cells of different machines, versions or
commits are never put into one table: ``require_one_environment`` refuses them.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.environment import environment
from runtime.errors import BabeltowerError

__all__ = [
    "Record",
    "artefact_sha256",
    "interval",
    "read_records",
    "record_of",
    "require_one_environment",
    "write_records",
]

SCHEMA = 1
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True, slots=True)
class Record:
    """One cell; see the module's docstring for each field."""

    cell: Mapping[str, str]
    unit: str
    samples: tuple[float, ...]
    settings: Mapping[str, Any]
    artefact: str | None
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str | None

    def __post_init__(self) -> None:
        if not self.samples:
            raise BabeltowerError(f"The record of {dict(self.cell)} has no samples; nothing was measured.")

    @property
    def median(self) -> float:
        """Of the samples."""
        return statistics.median(self.samples)


def record_of(
    cell: Mapping[str, str],
    samples: Sequence[float],
    *,
    unit: str,
    settings: Mapping[str, Any],
    artefact: str | None = None,
) -> Record:
    """A record of this process's machine, packages and source tree."""
    here = environment()
    machine = {
        "cpu": here.cpu,
        "flags": _flags(Path("/proc/cpuinfo")),
        "governor": _GOVERNOR.read_text().strip() if _GOVERNOR.is_file() else None,
        "n_cores": here.n_cores,
        "n_cores_of_machine": os.cpu_count(),
        "system": here.system,
    }
    versions = {**here.versions, "python": here.python}
    return Record(cell, unit, tuple(samples), settings, artefact, machine, versions, here.commit)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """The distribution-free interval of the median, of at least 95% where there are 6 samples or more.

    The k-th smallest and k-th largest sample, k from the binomial distribution; all samples where there
    are fewer than 6.
    """
    ordered, n = sorted(samples), len(samples)
    below, k, term = 0.0, 0, 0.5**n
    while k < n // 2 and below + term <= 0.025:
        below += term
        term *= (n - k) / (k + 1)
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def require_one_environment(records: Iterable[Record]) -> None:
    """Refuse records that may not stand in one table.

    Raises:
        BabeltowerError: two of them differ in machine, versions or commit.
    """
    seen: Record | None = None
    for record in records:
        if seen is None:
            seen = record
            continue
        for name in ("machine", "versions", "commit"):
            ours, theirs = getattr(seen, name), getattr(record, name)
            if ours != theirs:
                raise BabeltowerError(
                    f"Records of different environments are not compared: {name} is {ours} for "
                    f"{dict(seen.cell)} and {theirs} for {dict(record.cell)}. Measure both in one run."
                )


def artefact_sha256(*files: Path) -> str:
    """Over the contents of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def write_records(records: Sequence[Record], path: Path) -> None:
    """Write a file of records; it is renamed into place when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    data = {"schema": SCHEMA, "cells": [asdict(record) for record in records]}
    draft.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def read_records(path: Path) -> list[Record]:
    """Read a file of records.

    Raises:
        BabeltowerError: the file is not of this schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise BabeltowerError(f"{path} has schema {data['schema']}; this version reads {SCHEMA}.")
        return [Record(**{**cell, "samples": tuple(cell["samples"])}) for cell in data["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BabeltowerError(f"{path} holds no benchmark records ({error}); measure again.") from error


def _flags(cpuinfo: Path) -> list[str]:
    """Those instruction sets that decide a matrix product's speed."""
    if not cpuinfo.is_file():
        return []
    text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    words = next(
        (line.partition(":")[2].split() for line in text.splitlines() if line[:5] in ("flags", "Featu")), []
    )
    return [flag for flag in _FLAGS if flag in words]
