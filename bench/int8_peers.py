"""Compare INT8 by this project, NNCF and nvidia-modelopt on the same batches and retrieval set.

    python -m bench.int8_peers [SAMPLE …] --modelopt-python ENVIRONMENT/bin/python --json FILE

Every library quantizes the same FP32 graphs, calibrated on the same batches, with its own defaults for
transformers; every engine then retrieves with each. modelopt pins other versions of onnx and ONNX Runtime, so
it runs in an environment of its own; without ``--modelopt-python`` it is left out, and the record says so.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.models.samples import ROOT, sample_checkpoints
from bench.records.environment import environment
from export.checkpoint import towers_from_checkpoint
from export.commands.progress import progress_bars
from export.precision.int8 import GraphTarget, int8_from_onnx, recipe_for
from export.retrieval.comparison import Direction, compare_language
from export.retrieval.metrics import RetrievalProtocol
from export.retrieval.vectors import Vectors
from export.sensitivity.quantize import QuantizeOptions, Study, study_of_towers
from export.sensitivity.trials import embedded
from runtime.commands.reporting import ErrorReportingCommand
from runtime.cosines import mean_cosine
from runtime.errors import EngineError
from runtime.manifest import GRAPH_ENGINES, Engine, Modality

__all__ = ["SCHEMA", "app", "peer_figures"]

SCHEMA = "babeltower-int8-peers/1"

Batches = Sequence[Mapping[str, NDArray[Any]]]
Quantize = Callable[[Path, Path, Batches], Path]
"""Function from the source, the ONNX file to write and the batches to the written file."""

app = typer.Typer(add_completion=False)


def ours(target: GraphTarget) -> Quantize:
    """Return this project's default recipe for an engine."""

    def quantize(source: Path, graph: Path, batches: Batches) -> Path:
        int8_from_onnx(
            source, graph, data_name=f"{graph.stem}.data", calibration=batches, recipe=recipe_for(target)
        )
        return graph

    return quantize


def by_nncf(engine: Engine) -> Quantize:
    """Return NNCF with its defaults for transformers, on the engine's own kind of graph."""

    def quantize(source: Path, graph: Path, batches: Batches) -> Path:
        import nncf
        import onnx
        import openvino

        logging.getLogger("nncf").setLevel(logging.ERROR)
        is_native = engine is Engine.OPENVINO
        quantized = nncf.quantize(
            openvino.Core().read_model(source) if is_native else onnx.load(str(source)),
            nncf.Dataset([dict(batch) for batch in batches]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
        )
        written = graph.with_suffix(".xml") if is_native else graph
        if is_native:
            openvino.save_model(quantized, written, compress_to_fp16=False)
        else:
            onnx.save(quantized, str(written))
        return written

    return quantize


def by_modelopt(python: Path, method: str) -> Quantize:
    """Return nvidia-modelopt in its own environment."""

    def quantize(source: Path, graph: Path, batches: Batches) -> Path:
        arrays = {f"{i}/{name}": array for i, batch in enumerate(batches) for name, array in batch.items()}
        data = graph.with_suffix(".npz")
        np.savez(data, **arrays)  # type: ignore[arg-type]
        script = ROOT / "bench" / "peers" / "isolated" / "modelopt_graph.py"
        command = [str(python), str(script), str(source), str(graph), str(data), method]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not graph.is_file():
            raise EngineError(f"modelopt could not quantize {source.name}: {done.stderr.strip()[-400:]}")
        return graph

    return quantize


def peer_figures(study: Study, quantize: Quantize, engine: Engine, folder: Path) -> dict[str, Any]:
    """Quantize both towers by one recipe for one engine; return drops in points, and cosines."""
    vectors, seconds = {}, {}
    for modality in Modality:
        graph = folder / f"{modality.value}.onnx"
        if not graph.is_file():
            graph = quantize(study.sources[modality], graph, study.calibration.batches(modality))
        vectors[modality], took = embedded(graph, study.trials.inputs.batches[modality], engine=engine)
        seconds[modality] = took / len(vectors[modality])
    reference, dataset = study.reference, study.reference.dataset
    found = Vectors(vectors[Modality.IMAGE], vectors[Modality.TEXT], reference.index)
    languages = [
        compare_language(dataset, captions, reference.vectors, found, RetrievalProtocol.ANY)
        for captions in dataset.captions
    ]
    drops = {
        d.value: {figures.code: 100 * figures.comparison(d).drop(1) for figures in languages}
        for d in Direction
    }
    return {
        "mean_drop_points": {d: float(np.mean(list(found.values()))) for d, found in drops.items()},
        "worst_drop_points": {d: max(found.values()) for d, found in drops.items()},
        "text_cosine": mean_cosine(found.texts, reference.vectors.texts),
        "image_cosine": mean_cosine(found.images, reference.vectors.images),
        "per_core_second": {modality.value: 1 / took for modality, took in seconds.items()},
        "drop_points": drops,
    }


@app.command(cls=ErrorReportingCommand)
def int8_peers(
    samples: Annotated[
        list[str] | None, typer.Argument(metavar="[SAMPLE]...", help="All by default.")
    ] = None,
    modelopt_python: Annotated[
        Path | None, typer.Option(help="Python of an environment with nvidia-modelopt.")
    ] = None,
    captions_per_language: Annotated[int, typer.Option(min=1, help="Captions per language.")] = 200,
    all_captions: Annotated[bool, typer.Option("--all-captions", help="Use every caption.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record.")] = None,
) -> None:
    """Quantize the samples with every library, and print the loss of each."""
    console = Console()
    rows = []
    for checkpoint in sample_checkpoints(samples or ()):
        name = checkpoint.name
        options = QuantizeOptions(
            engine=Engine.ONNXRUNTIME,
            captions_per_language=None if all_captions else captions_per_language,
        )
        towers = towers_from_checkpoint(checkpoint)
        with tempfile.TemporaryDirectory() as work, progress_bars(console) as progress:
            study = study_of_towers(towers, name, Path(work), options, progress)
            for engine in GRAPH_ENGINES:
                recipes: dict[str, Quantize] = {
                    "babeltower": ours(GraphTarget(engine.value)),
                    "nncf": by_nncf(engine),
                }
                if modelopt_python is not None:
                    recipes["modelopt max"] = by_modelopt(modelopt_python, "max")
                    recipes["modelopt entropy"] = by_modelopt(modelopt_python, "entropy")
                for recipe, quantize in recipes.items():
                    own = "" if recipe.startswith("modelopt") else f"-{engine.value}"
                    folder = Path(work) / f"{recipe.replace(' ', '-')}{own}"
                    folder.mkdir(exist_ok=True)
                    try:
                        figures = peer_figures(study, quantize, engine, folder)
                    except EngineError as error:  # a graph that an engine refuses is a finding
                        console.print(f"{name}, {recipe}, {engine.value}: {error}", markup=False)
                        continue
                    rows.append({"model": name, "engine": engine.value, "recipe": recipe, **figures})
    console.print(_table(rows))
    if json_file is not None:
        record = {
            "schema": SCHEMA,
            "environment": asdict(environment()),
            "captions_per_language": None if all_captions else captions_per_language,
            "modelopt": modelopt_python is not None,
            "rows": rows,
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"record  {json_file}", markup=False, soft_wrap=True)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("model", "engine", "recipe", "mean drop", "worst language", "text cosine", "image cosine")
    table = Table(*columns, title="R@1 lost against PyTorch in points, the worse direction")
    for row in rows:
        table.add_row(
            row["model"],
            row["engine"],
            row["recipe"],
            f"{max(row['mean_drop_points'].values()):.2f}",
            f"{max(row['worst_drop_points'].values()):.2f}",
            f"{row['text_cosine']:.5f}",
            f"{row['image_cosine']:.5f}",
        )
    return table


if __name__ == "__main__":
    app()
