"""Measure the speed of each precision in each engine at full size, for the tables of decision 0007.

    python -m bench.precision_speed [TOWER …] --work FOLDER --json bench/results/precision_speed.json

Full-size towers with random weights are exported into the work folder (kept there for the next run), and
every engine × precision is run in turns in one process, one thread, beside PyTorch eager in FP32, NNCF's own
quantization in OpenVINO, and the machine's INT8 peak. A figure is rows per second of CPU time; a ratio is the
median over the turns of ratios *within* a turn, so that a busy machine's drift cancels. No time counts before
the outputs were compared with PyTorch's. Inputs are random: speed does not depend on them. If towers are
named, the record keeps the cells of the others that were measured in the same environment.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import onnx_ir
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.models.speed_artefacts import Artefact, artefacts_of, random_inputs, torch_towers
from bench.peaks import peak_samplers
from bench.records.record import (
    Record,
    artefact_sha256,
    interval,
    paired,
    record_of,
    records_to_keep,
    write_records,
)
from bench.timing.footprint import footprint_of
from bench.timing.speed_cells import (
    CASES,
    NNCF,
    PEAK,
    TORCH,
    SpeedCase,
    cells_by_shape,
    share_of_peak,
    verdicts_of_cells,
)
from export.graphs.matrix_products import operations_by_product
from runtime.backends import open_backend
from runtime.cosines import lowest_cosine
from runtime.errors import BabeltowerError, InputError
from runtime.manifest import Modality, Precision

__all__ = ["measure_case"]

_LOWEST_COSINE_OF_NNCF = 0.95
"""Limit for NNCF's model, which is only compared with and never published."""
_LOWEST_COSINE = {Precision.FP32: 0.99999, Precision.BF16: 0.999, Precision.INT8: 0.99}
_SECONDS = 0.25


class _Runs(Protocol):
    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]: ...


class _Torch:
    """Eager model of the family's own library, on one thread."""

    def __init__(self, case: SpeedCase, work: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self._towers = torch_towers(case.variant, work)
        self._modality = case.modality

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        towers = self._towers
        if self._modality is Modality.TEXT:
            return [towers.reference.text_vectors(inputs["input_ids"])[towers.dim]]
        scale, shift = (towers.image.get_buffer(name).numpy() for name in ("scale", "shift"))
        pixels = inputs["pixels"].astype(np.float32) * scale + shift
        return [towers.reference.image_vectors(pixels)[towers.dim]]


def measure_case(case: SpeedCase, work: Path, *, turns: int) -> list[Record]:
    """Time one tower in every form.

    Raises:
        BabeltowerError: an output is not close to PyTorch's.
    """
    artefacts = artefacts_of(case.variant, case.modality, work)
    forms: dict[str, _Runs] = {TORCH: _Torch(case, work)}
    for name, artefact in artefacts.items():
        forms[name] = open_backend(artefact.engine, artefact.graph, precision=artefact.precision, threads=1)
    hashes = {name: artefact_sha256(*artefact.files) for name, artefact in artefacts.items()}
    graph = next(a.graph for a in artefacts.values() if a.precision is Precision.FP32)
    records = []
    for rows, tokens in case.shapes:
        inputs = random_inputs(graph, n_rows=rows, n_tokens=tokens)
        cosines = _cosines(forms, inputs)
        _require_close(cosines, artefacts)
        operations = sum(
            operations_by_product(onnx_ir.load(graph), {"batch": rows, "sequence": tokens}).values()
        )
        settings = {"threads": 1, "turns": turns, "seconds": _SECONDS, "operations_per_run": 2 * operations}
        for name, samples in _turns(forms, inputs, rows, turns).items():
            shape = f"{rows}" if case.modality is Modality.IMAGE else f"{rows}×{tokens}"
            cell = {"tower": case.tower, "shape": shape, "form": name}
            if name == PEAK:
                records.append(record_of(cell, samples, unit="GOP/s", settings=settings))
                continue
            own = {**settings, "cosine_to_torch": cosines[name], "rows": rows, "tokens": tokens}
            records.append(
                record_of(cell, samples, unit="rows/core-second", settings=own, artefact=hashes.get(name))
            )
    for form in forms.values():
        if not isinstance(form, _Torch):
            form.close()  # type: ignore[attr-defined]
    return records


def _turns(
    forms: Mapping[str, _Runs], inputs: Mapping[str, NDArray[Any]], rows: int, turns: int
) -> dict[str, list[float]]:
    """Return samples of every form and of the INT8 peak, one per turn."""
    peak = peak_samplers(["int8"], seconds=_SECONDS)["int8"]
    n_runs = {}
    for name, form in forms.items():
        form.run(inputs, ["vector"])
        n_runs[name] = max(1, round(_SECONDS / max(_cpu_seconds(form, inputs, 1), 1e-4)))
    found: dict[str, list[float]] = {name: [] for name in (*forms, PEAK)}
    names = list(forms)
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            form = forms[name]
            found[name].append(rows * n_runs[name] / _cpu_seconds(form, inputs, n_runs[name]))
        found[PEAK].append(peak())
    return found


def _cpu_seconds(form: _Runs, inputs: Mapping[str, NDArray[Any]], n_runs: int) -> float:
    started = time.process_time()
    for _ in range(n_runs):
        form.run(inputs, ["vector"])
    return time.process_time() - started


def _cosines(forms: Mapping[str, _Runs], inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return each form's lowest cosine of any row to PyTorch's.

    Raises:
        BabeltowerError: a form gives a vector that is zero or not finite.
    """
    vectors = {name: form.run(inputs, ["vector"])[0] for name, form in forms.items()}
    cosines = {}
    for name, found in vectors.items():
        try:
            cosines[name] = lowest_cosine(found, vectors[TORCH])
        except InputError as error:
            raise BabeltowerError(f"{name}: {error}") from error
    return cosines


def _require_close(cosines: Mapping[str, float], artefacts: Mapping[str, Artefact]) -> None:
    for name, artefact in artefacts.items():
        limit = _LOWEST_COSINE_OF_NNCF if name == NNCF else _LOWEST_COSINE[artefact.precision]
        if not cosines[name] >= limit:
            raise BabeltowerError(
                f"{name} gives other vectors than PyTorch: cosine {cosines[name]:.5f}, expected at least "
                f"{limit}. Its speed is not valid; remove {artefact.graph.parent} and measure again."
            )


def print_tables(records: Sequence[Record], console: Console) -> bool:
    """Print every cell and the verdicts; return True if all targets hold."""
    table = Table("tower", "shape", "form", "rows/core-s", "95%", "× PyTorch", "of int8 peak", "cosine")
    verdicts = Table("tower", "shape", "target", "measured", "by", "holds")
    holds = True
    for (tower, shape), forms in cells_by_shape(records).items():
        peak = forms[PEAK]
        for name, record in forms.items():
            low, high = interval(record.samples)
            if name == PEAK:
                table.add_row(tower, shape, name, f"{record.median:.0f} GOP/s", f"{low:.0f}–{high:.0f}")
                continue
            cosine = record.settings["cosine_to_torch"]
            ratio, share = paired(record, forms[TORCH]), share_of_peak(record, peak)
            figures = f"{record.median:.2f}", f"{low:.2f}–{high:.2f}", f"{ratio:.2f}", f"{share:.0%}"
            table.add_row(tower, shape, name, *figures, f"{cosine:.5f}")
        for target, measured, name, held in verdicts_of_cells(tower, forms):
            holds &= held
            verdicts.add_row(tower, shape, target, measured, name, "yes" if held else "[red]no[/red]")
    console.print(table, verdicts)
    return holds


def main(
    towers: Annotated[list[str] | None, typer.Argument(help="Names of CASES; all by default.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for graphs, up to 8 GB; kept.")] = Path("full-size"),
    turns: Annotated[int, typer.Option(min=3)] = 7,
    record: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
    prepare: Annotated[bool, typer.Option(help="Only export and quantize.")] = False,
) -> None:
    """Time every precision in every engine; exit code 1 if a target is missed."""
    console = Console(width=140)
    if unknown := set(towers or ()) - {case.tower for case in CASES}:
        raise typer.BadParameter(f"{sorted(unknown)}; expected some of {[case.tower for case in CASES]}.")
    records = (
        []
        if record is None or prepare or not towers
        else records_to_keep(record, lambda old: old.cell["tower"] in towers)
    )
    for case in CASES:
        if towers and case.tower not in towers:
            continue
        if prepare:
            artefacts_of(case.variant, case.modality, work)
            continue
        records += measure_case(case, work, turns=turns)
        gc.collect()
        if record is not None:
            write_records(records, record)
        if case.tower == "NLLB-600M":
            records += footprint_of(
                artefacts_of(case.variant, case.modality, work)["onnxruntime int8"], case.tower
            )
    if prepare:
        return
    if record is not None:
        write_records(records, record)
    holds = print_tables(records, console)
    for found in (r for r in records if "footprint" in r.cell):
        console.print(f"{found.cell['tower']} {found.cell['footprint']}: {found.median:,.2f} {found.unit}")
    raise typer.Exit(0 if holds else 1)


if __name__ == "__main__":
    typer.run(main)
