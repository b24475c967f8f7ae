"""List the kernels that a TensorRT compiler builds for the full-size towers, without a GPU.

    python -m bench.tensorrt_rtx [TOWER …] --work FOLDER --json bench/results/tensorrt_rtx.json

Towers with random weights are exported, converted for TensorRT and built ahead of time with TensorRT-RTX;
nothing is executed. A cell is one build: the contents of its log (kernels, the types of the matrix products,
fused attentions), bytes, seconds. Exit code 1 if a product is not of its type, or an attention is not one
kernel.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import onnx_ir

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.models.full_size import in_process
from bench.models.speed_artefacts import calibration_batches, fp32_graph
from bench.records.record import Record, record_of, write_records
from export.tensorrt.engine import engine_from_onnx
from export.tensorrt.kernels import expected_types
from export.tensorrt.options import EngineOptions, default_profiles
from export.tensorrt.variant import tensorrt_graph
from runtime.backends.plans import AHEAD_OF_TIME, Compiler
from runtime.errors import BabeltowerError
from runtime.manifest import Modality, Precision

__all__ = ["TOWERS", "Build", "Tower", "build"]

_PRECISIONS = (Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8)
_TARGETS = ("8.0", "8.6", "8.9")
_FP8_SINCE = "8.9"


@dataclass(frozen=True, slots=True)
class Tower:
    """Published tower, with the largest batch and text of its engines."""

    name: str
    variant: str
    modality: Modality
    max_batch: int
    context_length: int = 1


TOWERS = (
    Tower("ViT-B/32", "xlm-roberta-base-ViT-B-32", Modality.IMAGE, 32),
    Tower("ViT-L/14", "AltCLIP", Modality.IMAGE, 32),
    Tower("XLM-R base", "xlm-roberta-base-ViT-B-32", Modality.TEXT, 64, 77),
    Tower("NLLB-600M", "nllb-clip-base", Modality.TEXT, 64, 77),
)


@dataclass(frozen=True, slots=True)
class Build:
    """Result of one build; ``expected`` counts the graph's products by the required type."""

    expected: Mapping[str, int]
    products: Mapping[str, int]
    unseen: Sequence[str]
    n_attentions: int
    n_fused_attention: int
    n_kernels: int
    plan_bytes: int
    build_s: float
    compiler: str
    note: str

    @property
    def faults(self) -> list[str]:
        """All violated expectations."""
        found = []
        if dict(self.products) != dict(self.expected):
            found.append(f"products {dict(self.products)}, expected {dict(self.expected)}")
        if self.unseen:
            found.append(f"no kernel names {list(self.unseen)}")
        if self.n_fused_attention != self.n_attentions:
            found.append(f"{self.n_fused_attention} of {self.n_attentions} attentions are one kernel")
        return found


def graph_for(tower: Tower, precision: Precision, work: Path) -> Path:
    """Return the tower's graph for TensorRT, making it if it is missing."""
    source = fp32_graph(tower.variant, tower.modality, work)
    target = source.with_name(f"{precision.value}_tensorrt.onnx")
    if not target.is_file():
        tensorrt_graph(
            precision,
            source,
            target,
            data_name=f"{target.stem}.data",
            batches=calibration_batches(source),
            threads=1,
        )
    return target


def build(graph: Path, tower: Tower, compute_capability: str) -> Build:
    """Build a graph for one target, and discard the engine.

    Raises:
        ExportError: the compiler refuses the graph, or a product is not of its type.
    """
    model = onnx_ir.load(graph)
    types = list(expected_types(model).values())
    dims = ("batch", "sequence") if tower.modality is Modality.TEXT else ("batch",)
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        started = time.perf_counter()
        manifest = engine_from_onnx(
            graph,
            Path(folder) / "model.plan",
            profiles=default_profiles(dims, max_batch=tower.max_batch, context_length=tower.context_length),
            options=EngineOptions(compiler=Compiler.TENSORRT_RTX, compute_capability=compute_capability),
        )
        seconds = time.perf_counter() - started
    return Build(
        expected={dtype: types.count(dtype) for dtype in sorted(set(types))},
        products=manifest.kernels.products,
        unseen=manifest.kernels.unseen,
        n_attentions=sum(node.op_type == "Softmax" for node in model.graph),
        n_fused_attention=manifest.kernels.n_fused_attention,
        n_kernels=manifest.kernels.n_kernels,
        plan_bytes=manifest.plan_bytes,
        build_s=seconds,
        compiler=f"{manifest.compiler} {manifest.compiler_version}",
        note=manifest.note,
    )


def _record(tower: Tower, precision: Precision, compute_capability: str, built: Build) -> Record:
    cell = {"tower": tower.name, "precision": precision.value, "compute_capability": compute_capability}
    facts: dict[str, Any] = {**asdict(built), "max_batch": tower.max_batch, "weights": "random"}
    facts.pop("build_s")
    return record_of(cell, [built.build_s], unit="s", settings=facts)


def table_of(records: Sequence[Record]) -> Table:
    """Return a table with one row per build."""
    table = Table(
        "tower", "precision", "for", "kernels", "products", "attentions fused", "MB", "s", title=AHEAD_OF_TIME
    )
    for record in records:
        facts = record.settings
        table.add_row(
            record.cell["tower"],
            record.cell["precision"],
            "SM" + record.cell["compute_capability"].replace(".", ""),
            str(facts["n_kernels"]),
            ", ".join(f"{n} {dtype}" for dtype, n in facts["products"].items()),
            f"{facts['n_fused_attention']} of {facts['n_attentions']}",
            f"{facts['plan_bytes'] / 1e6:,.0f}",
            f"{record.median:.1f}",
        )
    return table


def main(
    towers: Annotated[list[str] | None, typer.Argument(help="Names of TOWERS; all by default.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for graphs, up to 15 GB; kept.")] = Path("full-size"),
    precision: Annotated[list[Precision], typer.Option(help="May be repeated.")] = list(_PRECISIONS),  # noqa: B006
    target: Annotated[
        list[str], typer.Option(help="Compute capability to build for; may be repeated.")
    ] = list(_TARGETS),  # noqa: B006
    record: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
) -> None:
    """Build full-size towers ahead of time with TensorRT-RTX, and list the kernels."""
    console = Console(width=140)
    if unknown := set(towers or ()) - {tower.name for tower in TOWERS}:
        raise typer.BadParameter(f"{sorted(unknown)} are not towers; known are {[t.name for t in TOWERS]}.")
    records: list[Record] = []
    faults: list[str] = []
    for tower in (tower for tower in TOWERS if not towers or tower.name in towers):
        for form in precision:
            for capability in (c for c in target if form is not Precision.FP8 or c >= _FP8_SINCE):
                name = f"{tower.name} {form.value} for {capability}"
                console.print(f"{name} …")
                try:
                    graph, _ = in_process(graph_for, tower, form, work)
                    built, _ = in_process(build, graph, tower, capability)
                except BabeltowerError as error:
                    faults.append(f"{name}: {error}")
                    continue
                faults += [f"{name}: {fault}" for fault in built.faults]
                records.append(_record(tower, form, capability, built))
                if record is not None:
                    write_records(records, record)
    console.print(table_of(records))
    for fault in faults:
        console.print(f"[red]{escape(fault)}[/red]")
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    typer.run(main)
