"""Export every published variant at full size with random weights, and check memory and parity.

    python -m bench.full_size [VARIANT …] --work FOLDER

No network is needed: architectures come from open_clip, transformers and ``export/families/published.py``,
tokenizers from the sample checkpoints (a tower does not depend on its tokenizer's size). Each variant is
built, exported and removed in processes of its own, so that peak memory is that variant's alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.models.full_size import checkpoint_from_variant, in_process
from export.families.published import VARIANTS
from runtime.backends import open_backend
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.cosines import highest, lowest
from runtime.errors import BabeltowerError, ExportError
from runtime.manifest import Engine, Precision

__all__ = ["FullSizeResult", "fused_error", "measure_variant"]


@dataclass(frozen=True, slots=True)
class FullSizeResult:
    """Result of one variant: sizes and memory in bytes, times in seconds, parity over both engines.

    ``max_fused_error`` is the largest difference between the graphs for CUDA and the exported ones;
    ``not_fused`` is the reason for each graph that has no form for CUDA.
    """

    variant: str
    image_parameters: int
    text_parameters: int
    image_bytes: int
    text_bytes: int
    export_s: float
    peak_export_bytes: int
    min_cosine: float
    max_abs_error: float
    max_fused_error: float
    not_fused: tuple[str, ...]
    dims: tuple[int, ...]


def measure_variant(name: str, work: Path) -> FullSizeResult:
    """Build, export and remove one variant, each step in a process of its own.

    Raises:
        BabeltowerError: the export failed, or parity did not hold.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=work))
    try:
        image_tower, _ = in_process(checkpoint_from_variant, name, folder / name)
        started = time.perf_counter()
        record, peak_bytes = in_process(_export, folder / name, folder / "repository", image_tower)
        seconds = time.perf_counter() - started
        errors, not_fused = [], []
        for graph in sorted((folder / "repository").glob("*_tower_fp32/1/model.onnx")):
            try:
                errors.append(in_process(fused_error, graph, folder / "fused")[0])
            except ExportError as error:
                not_fused.append(str(error))
        return FullSizeResult(
            variant=name,
            export_s=seconds,
            peak_export_bytes=peak_bytes,
            max_fused_error=highest(errors),
            not_fused=tuple(not_fused),
            **record,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fused_error(graph: Path, folder: Path) -> float:
    """Return the largest difference of any component between a graph and its fused form, on the processor.

    Args:
        graph: Exported FP32 graph of a tower.
        folder: Folder for the fused graph, which is removed.
    """
    from export.precision.cuda import cuda_from_onnx

    fused = folder / "model.onnx"
    cuda_from_onnx(graph, fused, data_name="model.data", precision=Precision.FP32)
    try:
        given = _random_inputs(graph)
        expected = [_outputs(graph, inputs) for inputs in given]
        found = [_outputs(fused, inputs) for inputs in given]
        return highest(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    finally:
        shutil.rmtree(folder)


def _random_inputs(graph: Path) -> list[dict[str, NDArray[Any]]]:
    """Return three batches of texts of unequal length, or of images."""
    random = np.random.default_rng(0)
    backend = open_backend(Engine.ONNXRUNTIME, graph, precision=Precision.FP32)
    assert isinstance(backend, OnnxRuntimeBackend)
    inputs = backend.signature.inputs
    backend.close()
    if "pixels" in inputs:
        shape = inputs["pixels"].shape[1:]
        return [{"pixels": random.integers(0, 256, (rows, *shape), dtype=np.uint8)} for rows in (1, 2, 3)]
    fixed = inputs["input_ids"].shape[1]
    batches = []
    for rows, length in ((1, 8), (3, 16), (2, 77)):
        length = length if fixed < 0 else fixed
        mask = (np.arange(length) < random.integers(1, length + 1, (rows, 1))).astype(np.int64)
        ids = np.where(mask == 1, random.integers(3, 1_000, (rows, length)), 1)
        arrays = {"input_ids": ids, "attention_mask": mask}
        batches.append({name: arrays[name] for name in inputs})
    return batches


def _outputs(graph: Path, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
    backend = open_backend(Engine.ONNXRUNTIME, graph, precision=Precision.FP32)
    try:
        return backend.run(inputs, ["vector"])[0]
    finally:
        backend.close()


def _export(checkpoint: Path, repository: Path, image_tower: Path | None) -> dict[str, Any]:
    from export.checkpoint import towers_from_checkpoint
    from export.repository import ExportOptions, repository_from_towers

    towers = towers_from_checkpoint(checkpoint, image_tower=image_tower)
    counts = {
        "image_parameters": sum(p.numel() for p in towers.image.parameters()),
        "text_parameters": sum(p.numel() for p in towers.text.parameters()),
    }
    options = ExportOptions(texts_per_language=1, captions_per_language=0)
    done = repository_from_towers(towers, repository, name=checkpoint.name, options=options)
    variant = done.manifest.variants["fp32"]
    parts = [a for f in done.parity["fp32"].engines.values() for a in (f.text, f.image, *f.shapes.values())]
    return {
        **counts,
        "image_bytes": sum(record.size_bytes for record in variant.image.files),
        "text_bytes": sum(record.size_bytes for record in variant.text.files),
        "min_cosine": lowest(a.min_cosine for a in parts),
        "max_abs_error": highest(a.max_abs_error for a in parts),
        "dims": towers.dims,
    }


def main(
    variants: Annotated[list[str] | None, typer.Argument(help="Published names; all by default.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, up to 15 GB; emptied after each variant.")
    ] = None,
    record: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Export published variants at full size and report parity, sizes, time and memory."""
    console = Console()
    results = []
    failures = 0
    for name in variants or list(VARIANTS):
        console.print(f"{name} …")
        try:
            results.append(measure_variant(name, work or Path(tempfile.gettempdir())))
        except BabeltowerError as error:
            failures += 1
            console.print(f"[red]{name}: {error}[/red]")
        if record is not None:
            record.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n", encoding="utf-8")
    console.print(_table(results))
    raise typer.Exit(1 if failures else 0)


def _table(results: list[FullSizeResult]) -> Table:
    columns = (
        "variant",
        "image M",
        "text M",
        "image MB",
        "text MB",
        "seconds",
        "peak GB",
        "cosine ≥",
        "error ≤",
        "fused ≤",
    )
    table = Table(*columns, title="Published variants at full size, random weights, FP32")
    for r in results:
        table.add_row(
            r.variant,
            f"{r.image_parameters / 1e6:,.0f}",
            f"{r.text_parameters / 1e6:,.0f}",
            f"{r.image_bytes / 1e6:,.0f}",
            f"{r.text_bytes / 1e6:,.0f}",
            f"{r.export_s:,.0f}",
            f"{r.peak_export_bytes / 1e9:.1f}",
            f"{r.min_cosine:.8f}",
            f"{r.max_abs_error:.1e}",
            f"{r.max_fused_error:.1e}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
