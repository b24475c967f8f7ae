"""Qualify TensorRT on a GPU: build the engines, check them against the parity gate, time them.

    python -m bench.gpu tensorrt [CHECKPOINT …] --json bench/results/gpu.json

Every sample checkpoint, and each named one, is exported for TensorRT in every precision that the GPU
supports, into a repository that is kept. The engines pass through the same gate as every export: one that
retrieves worse than PyTorch is refused, with a report beside the repository. Published engines are timed over
batch and sequence sizes, from arrays in host memory to arrays in host memory. Exit code 1 if there is no GPU
or an engine was refused.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.models.samples import sample_checkpoints
from bench.records.record import Record, artefact_sha256, interval, record_of, write_records
from export.repository import ExportOptions, repository_from_checkpoint
from export.tensorrt.engine import require_compiler
from export.tensorrt.options import EngineOptions
from export.variants import FORMS, Form
from runtime.backends import open_backend
from runtime.backends.plans import DeviceFacts, PlanManifest
from runtime.cosines import require_directions
from runtime.errors import BabeltowerError, EngineError, ParityError
from runtime.manifest import Engine, Manifest, Modality, TowerFiles, manifest_path

__all__ = ["Grid", "forms_of_gpu", "qualify"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Shapes to time: ``repeats`` runs of each, after ``warm_up`` runs that do not count."""

    batches: tuple[int, ...] = (1, 8, 32)
    sequences: tuple[int, ...] = (16, 32, 77)
    repeats: int = 50
    warm_up: int = 5


def forms_of_gpu(device: DeviceFacts) -> tuple[Form, ...]:
    """Return every form for TensorRT whose products the GPU can compute."""
    forms = [form for form in FORMS if form.engine is Engine.TENSORRT]
    return tuple(form for form in forms if device.multiplies_in(form.precision))


def qualify(
    checkpoint: Path, repository: Path, device: DeviceFacts, *, grid: Grid, options: ExportOptions
) -> tuple[list[Record], str]:
    """Export a checkpoint for this GPU and time the variants that pass the gate.

    Returns:
        The records, and the gate's refusals (empty if there are none).
    """
    name = checkpoint.name
    refusal = ""
    try:
        repository_from_checkpoint(
            checkpoint,
            repository,
            name=name,
            options=dataclasses.replace(options, forms=options.forms or forms_of_gpu(device), replace=True),
        )
    except ParityError as error:
        refusal = str(error)
    model = repository / name
    if refusal and not manifest_path(model).is_file():
        return [], refusal
    return list(_timed(Manifest.read(model), repository, device, grid)), refusal


def _timed(manifest: Manifest, repository: Path, device: DeviceFacts, grid: Grid) -> Iterator[Record]:
    for key, variant in manifest.variants.items():
        if Engine.TENSORRT.value not in variant.engines:
            continue
        for modality in Modality:
            tower = variant.tower(modality)
            plan = repository / tower.model / str(tower.version) / tower.graph
            facts = PlanManifest.read(plan)
            settings = {**dataclasses.asdict(device), "tensorrt": facts.compiler_version, **_kernels(facts)}
            backend = open_backend(Engine.TENSORRT, plan, precision=variant.precision)
            try:
                for shape, inputs in _inputs(manifest, tower, modality, grid):
                    run = _seconds(backend, inputs, tower, grid)
                    cell = {"model": manifest.name, "tower": modality.value, "variant": key, "shape": shape}
                    yield record_of(
                        cell,
                        [1000 * seconds for seconds in run],
                        unit="ms",
                        settings={**settings, "rows": len(next(iter(inputs.values())))},
                        artefact=artefact_sha256(plan),
                    )
            finally:
                backend.close()


def _kernels(facts: PlanManifest) -> dict[str, Any]:
    return {"products": dict(facts.kernels.products), "n_fused_attention": facts.kernels.n_fused_attention}


def _inputs(
    manifest: Manifest, tower: TowerFiles, modality: Modality, grid: Grid
) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
    random = np.random.default_rng(0)
    batches = [batch for batch in grid.batches if batch <= tower.max_batch_size]
    if modality is Modality.IMAGE:
        size = manifest.image
        for batch in batches:
            shape = (batch, 3, size.height, size.width)
            yield f"{batch}", {"pixels": random.integers(0, 256, shape, dtype=np.uint8)}
        return
    for sequence in dict.fromkeys(min(s, manifest.text.context_length) for s in grid.sequences):
        for batch in batches:
            ids = np.full((batch, sequence), manifest.text.suffix_ids[-1], dtype=np.int64)
            yield f"{batch}×{sequence}", {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _seconds(backend: Any, inputs: dict[str, NDArray[Any]], tower: TowerFiles, grid: Grid) -> list[float]:
    outputs = [next(iter(tower.outputs.values()))]
    for _ in range(grid.warm_up):
        backend.run(inputs, outputs)
    found = []
    for _ in range(grid.repeats):
        started = time.perf_counter()
        (vectors,) = backend.run(inputs, outputs)
        found.append(time.perf_counter() - started)
        require_directions(vectors, what="timed vectors")
    return found


def table_of(records: Sequence[Record]) -> Table:
    """Return a table with one row per cell: latency, and rows per second."""
    table = Table("model", "tower", "variant", "shape", "ms", "95%", "rows/s")
    for record in records:
        low, high = interval(record.samples)
        rows = record.settings["rows"]
        table.add_row(
            *(record.cell[key] for key in ("model", "tower", "variant", "shape")),
            f"{record.median:.2f}",
            f"{low:.2f}–{high:.2f}",
            f"{1000 * rows / record.median:,.0f}",
        )
    return table


def main(
    checkpoints: Annotated[
        list[Path] | None, typer.Argument(help="Checkpoints to qualify, besides the samples.")
    ] = None,
    repository: Annotated[Path, typer.Option(help="Folder of the engines; kept.")] = Path("gpu/repository"),
    record: Annotated[Path, typer.Option("--json", help="File of the records.")] = Path("gpu/gpu.json"),
    samples: Annotated[bool, typer.Option(help="Qualify the sample checkpoints.")] = True,
    captions_per_language: Annotated[
        int, typer.Option(min=1, help="Captions per language for the gate.")
    ] = 200,
) -> None:
    """Build, check and time TensorRT engines on this machine's GPU; exit code 1 if there is none."""
    console = Console(width=120)
    try:
        device = require_compiler(EngineOptions())
    except EngineError as error:
        console.print(
            f"[red]This machine cannot qualify a GPU; nothing was measured.[/red] {escape(str(error))}"
        )
        raise typer.Exit(1) from None
    console.print(f"{device.name}, compute capability {device.compute_capability}, CUDA {device.cuda}")
    options = ExportOptions(captions_per_language=captions_per_language)
    records: list[Record] = []
    faults: list[str] = []
    for checkpoint in [*(sample_checkpoints() if samples else ()), *(checkpoints or ())]:
        console.print(f"{checkpoint.name} …")
        try:
            found, refusal = qualify(checkpoint, repository, device, grid=Grid(), options=options)
        except BabeltowerError as error:
            found, refusal = [], str(error)
        records += found
        if refusal:
            faults.append(f"{checkpoint.name}: {refusal}")
        if records:
            write_records(records, record)
    console.print(table_of(records))
    for fault in faults:
        console.print(f"[red]{escape(fault)}[/red]")
    raise typer.Exit(1 if faults or not records else 0)
