"""Records of measured cells: raw samples, unit, and everything that a figure depends on.

The format of the files of records under ``bench/results/``, schema 2 (as a JSON schema:
``record.schema.json``): a JSON object of

- ``schema``: 2;
- ``cells``: a list of objects, one per line, each with
    - ``cell``: name of the measurement, a flat mapping of strings;
    - ``unit``: unit of the samples (``ms``, ``rows/s``, ``rows/core-second``, ``MB``, ``GOP/s``,
      ``GB/s``, …);
    - ``samples``: every measured number, in order of measurement, process by process; never a mean;
    - ``processes``: number of samples of each process, in order; empty if one process gave them all;
    - ``error``: reason that nothing could be measured (``samples`` is empty then), else ``null``;
    - ``settings``: settings (threads, turns, …) and values to compare the figure with
      (``operations_per_run``, ``bytes_per_run``, ``min_cosine`` to the reference);
    - ``artefact``: sha256 of the measured file and its data, or ``null``;
    - ``machine``: processor, instruction sets, governor, cores, system;
    - ``versions``: versions of the packages and of Python; ``commit``: commit of the source tree.

Schema 1, without ``processes`` and ``error``, is read too.

The cells of the suite (``suite_cell``) all have the same keys, ``""`` if one does not apply:

- ``suite``: ``latency``, ``throughput``, ``peers``, ``peaks``, ``corpus``, ``server`` or ``gpu``;
- ``model``: name of a checkpoint, a sample or at full size; ``family``: ``nllb-clip``, ``capivara``, …;
- ``tower``: ``text`` or ``image``; ``by``: ``babeltower``, or the peer's name;
- ``engine``: ``onnxruntime``, ``openvino``, ``torch``, …; ``precision``: ``fp32``, ``bf16``, ``int8``, …;
- ``batch``: rows per run; ``tokens``: tokens of each text, padding included;
- ``metric``: ``wall`` and ``cpu`` (ms a run), ``device`` (ms a run, by the device's events), ``call`` (ms a
  run, inputs and outputs in the device's memory), ``rate``, ``resident`` (MB after the first answer),
  ``load`` (ms until the graph is open) or ``first`` (ms of the first answer after that);
- ``load``, only in ``throughput`` and ``server``: ``2×1`` (instances × threads of each), ``closed 8``
  (clients that each wait for their answer) or ``open 50%`` (Poisson arrivals, as a share of the highest
  measured rate); in ``gpu``: ``ragged`` for texts of unequal length.

Statistics are computed when records are read and never stored. Cells of different machines, versions or
commits never share a table: ``require_one_environment`` refuses them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.records.environment import environment
from runtime.errors import BabeltowerError
from runtime.machine import instruction_sets
from runtime.storage import replace_text

__all__ = [
    "NoRecordsError",
    "Record",
    "artefact_sha256",
    "interval",
    "no_figure",
    "paired",
    "ratios_by_turn",
    "read_records",
    "record_of",
    "records_to_keep",
    "require_one_environment",
    "suite_cell",
    "write_records",
]

SCHEMA = 2
_READ = (1, SCHEMA)
_SUITES = frozenset({"latency", "throughput", "peers", "peaks", "corpus", "server", "gpu"})
_METRICS = frozenset({"wall", "cpu", "device", "call", "rate", "resident", "load", "first"})
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


class NoRecordsError(BabeltowerError):
    """Error for a folder without any file of records."""


@dataclass(frozen=True, slots=True)
class Record:
    """Record of one cell; the module's docstring describes each field."""

    cell: Mapping[str, str]
    unit: str
    samples: tuple[float, ...]
    settings: Mapping[str, Any]
    artefact: str | None
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str | None
    processes: tuple[int, ...] = ()
    error: str | None = None

    def __post_init__(self) -> None:
        if self.error is not None and (self.samples or not self.error):
            raise BabeltowerError(
                f"The record of {dict(self.cell)} has {len(self.samples)} samples and the error "
                f"{self.error!r}; expected one or the other."
            )
        if self.error is None and not self.samples:
            raise BabeltowerError(f"The record of {dict(self.cell)} has no samples; nothing was measured.")
        if faulty := [name for name, value in self._figures() if not math.isfinite(value)]:
            raise BabeltowerError(
                f"The record of {dict(self.cell)} has {', '.join(dict.fromkeys(faulty))} that are not "
                "finite; such a figure compares as neither better nor worse. Measure again."
            )
        if any(isinstance(value, bool) for value in self.samples):
            raise BabeltowerError(
                f"The record of {dict(self.cell)} has samples that are not numbers. Measure again."
            )
        if self.processes and (sum(self.processes) != len(self.samples) or min(self.processes) < 1):
            raise BabeltowerError(
                f"The record of {dict(self.cell)} has {len(self.samples)} samples, and its processes gave "
                f"{list(self.processes)}."
            )

    def _figures(self) -> Iterator[tuple[str, float]]:
        yield from (("samples", value) for value in self.samples)
        yield from _floats("settings", self.settings)

    @property
    def median(self) -> float:
        """Median of the samples.

        Raises:
            BabeltowerError: there are no samples, because of the cell's ``error``.
        """
        if self.error is not None:
            raise BabeltowerError(f"{dict(self.cell)} was not measured: {self.error}")
        return statistics.median(self.samples)

    @property
    def by_process(self) -> tuple[tuple[float, ...], ...]:
        """Samples of each process."""
        ends = list(itertools.accumulate(self.processes or (len(self.samples),)))
        starts = [0, *ends[:-1]]
        return tuple(self.samples[start:end] for start, end in zip(starts, ends, strict=True))


def _floats(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _floats(f"{name}.{key}", part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _floats(name, part)


def suite_cell(
    *,
    suite: str,
    metric: str,
    model: str = "",
    family: str = "",
    tower: str = "",
    by: str = "babeltower",
    engine: str = "",
    precision: str = "",
    batch: int | None = None,
    tokens: int | None = None,
    load: str = "",
) -> dict[str, str]:
    """Return the name of a cell of the suite; the module's docstring explains the keys.

    Raises:
        BabeltowerError: the suite or the metric is unknown.
    """
    if suite not in _SUITES or metric not in _METRICS:
        raise BabeltowerError(
            f"Suite {suite!r} with metric {metric!r} is unknown; expected one of {sorted(_SUITES)} and one "
            f"of {sorted(_METRICS)}."
        )
    numbers = {"batch": batch, "tokens": tokens}
    return {
        **{"suite": suite, "model": model, "family": family, "tower": tower, "by": by},
        **{"engine": engine, "precision": precision},
        **{key: "" if value is None else str(value) for key, value in numbers.items()},
        "metric": metric,
        **({"load": load} if load else {}),
    }


def record_of(
    cell: Mapping[str, str],
    samples: Sequence[float],
    *,
    unit: str,
    settings: Mapping[str, Any],
    artefact: str | None = None,
    processes: Sequence[int] = (),
    error: str | None = None,
) -> Record:
    """Return a record with this process's machine, packages and source tree."""
    here = environment()
    machine = {
        "cpu": here.cpu,
        "flags": list(instruction_sets()),
        "governor": _GOVERNOR.read_text().strip() if _GOVERNOR.is_file() else None,
        "n_cores": here.n_cores,
        "n_cores_of_machine": os.cpu_count(),
        "system": here.system,
    }
    versions = {**here.versions, "python": here.python}
    return Record(
        cell=cell,
        unit=unit,
        samples=tuple(samples),
        settings=settings,
        artefact=artefact,
        machine=machine,
        versions=versions,
        commit=here.commit,
        processes=tuple(processes),
        error=error,
    )


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Return the distribution-free interval of the median, at least 95% for 6 samples or more.

    Its ends are the k-th smallest and k-th largest sample, k from the binomial distribution; with fewer than
    6 samples they are the smallest and the largest.
    """
    ordered, n = sorted(samples), len(samples)
    below, k, term = 0.0, 0, 0.5**n
    while k < n // 2 and below + term <= 0.025:
        below += term
        term *= (n - k) / (k + 1)
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def ratios_by_turn(over: Record, under: Record) -> list[float]:
    """Return the ratios of two cells that were measured in the same turns."""
    return [a / b for a, b in zip(over.samples, under.samples, strict=True)]


def paired(over: Record, under: Record) -> float:
    """Return the median of the ratios within the turns."""
    return statistics.median(ratios_by_turn(over, under))


def require_one_environment(records: Iterable[Record]) -> None:
    """Refuse records that must not share a table.

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
    """Return the SHA-256 of the contents of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def write_records(records: Sequence[Record], path: Path) -> None:
    """Write a file of records atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [json.dumps(asdict(record), ensure_ascii=False) for record in records]
    text = f'{{"schema": {SCHEMA}, "cells": [\n' + ",\n".join(cells) + "\n]}\n"
    replace_text(path, text)


def read_records(*paths: Path) -> list[Record]:
    """Read files of records in the given order; of a folder, its ``*.json`` files that have records.

    JSON files in a folder whose ``schema`` is not a number are of other kinds and are ignored.

    Raises:
        BabeltowerError: a file is not of a known schema, or a figure in it is not finite.
        NoRecordsError: a folder has no file of records.
    """
    found: list[Record] = []
    for path in paths:
        if not path.is_dir():
            found += _records_of(path, _data_of(path))
            continue
        files = {file: _data_of(file) for file in sorted(path.glob("*.json"))}
        ours = {
            file: data
            for file, data in files.items()
            if isinstance(data, dict) and isinstance(data.get("schema"), int)
        }
        if not ours:
            raise NoRecordsError(f"{path} holds no file of benchmark records; measure first.")
        for file, data in ours.items():
            found += _records_of(file, data)
    return found


def records_to_keep(path: Path, measured_anew: Callable[[Record], bool]) -> list[Record]:
    """Return a file's records that are not measured again, if the file exists; call before measuring.

    Raises:
        BabeltowerError: they are of another environment than this process's, so that they cannot share a
            table.
    """
    if not path.is_file():
        return []
    kept = [old for old in read_records(path) if not measured_anew(old)]
    require_one_environment([*kept, record_of({"by": "this process"}, [0.0], unit="", settings={})])
    return kept


def no_figure(constant: str) -> float:
    """Refuse NaN and infinities, which Python writes into JSON against the standard; for ``json.loads``.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"it holds {constant}, which is not a measured figure")


def _data_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=no_figure)
    except (OSError, ValueError) as error:
        raise BabeltowerError(f"{path} holds no benchmark records ({error}); measure again.") from error


def _records_of(path: Path, data: Any) -> list[Record]:
    try:
        if data["schema"] not in _READ:
            raise BabeltowerError(f"{path} has schema {data['schema']}; this version reads {list(_READ)}.")
        return [_record_from_json(cell) for cell in data["cells"]]
    except (KeyError, TypeError) as error:
        raise BabeltowerError(f"{path} holds no benchmark records ({error}); measure again.") from error


def _record_from_json(cell: Mapping[str, Any]) -> Record:
    lists = {"samples": tuple(cell["samples"]), "processes": tuple(cell.get("processes", ()))}
    return Record(**{**cell, **lists})
