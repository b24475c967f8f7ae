"""Write one tower of a variant as a Triton model: graph, configuration, tokenizer."""

from __future__ import annotations

import gzip
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from export.graphs.token_rows import keep_token_rows
from export.onnx_graph import input_names
from export.precision.calibration import CalibrationSet
from export.precision.graph_request import GraphRequest
from export.precision.int8 import Int8Recipe
from export.tensorrt.variant import PLAN
from export.towers import Towers, output_name
from export.triton.config import check_against_graph
from export.triton.tower_config import tower_config
from export.variants import Form
from runtime.manifest import (
    GPU_ENGINES,
    TOKENIZER_FILE,
    WHOLE_TOKENIZER_FILE,
    Engine,
    FileRecord,
    Modality,
    TowerFiles,
    record_of_file,
    tower_folder_name,
)
from runtime.preprocessing.buckets import CONTEXT_LENGTH
from runtime.triton_config import CONFIG_FILE

__all__ = ["GPU_MAX_BATCH_SIZE", "MAX_BATCH_SIZE", "max_batch_size", "tower_metadata", "write_tower"]

MAX_BATCH_SIZE = {Modality.TEXT: 64, Modality.IMAGE: 32}
"""Maximum rows of a tower's run on a CPU, where larger runs are no faster for a row."""

GPU_MAX_BATCH_SIZE = {Modality.TEXT: 512, Modality.IMAGE: 128}
"""Maximum rows of a tower's run on a GPU: short texts fill it in large runs only."""

_GRAPH = "model.onnx"


def max_batch_size(modality: Modality, engine: Engine) -> int:
    """Return the maximum rows of a tower's run in an engine."""
    return (GPU_MAX_BATCH_SIZE if engine in GPU_ENGINES else MAX_BATCH_SIZE)[modality]


def tower_metadata(towers: Towers, name: str, modality: Modality) -> dict[str, str]:
    """Return the metadata to store in a tower's graph."""
    return {
        "babeltower.version": importlib.metadata.version("babeltower"),
        "babeltower.name": name,
        "babeltower.family": towers.family,
        "babeltower.modality": modality.value,
        "babeltower.precision": "fp32",
        "babeltower.fingerprint": towers.fingerprint,
        "babeltower.licence": towers.licence,
        **(
            {CONTEXT_LENGTH: str(towers.text_preprocessing.context_length)}
            if modality is Modality.TEXT
            else {}
        ),
    }


def write_tower(
    towers: Towers,
    modality: Modality,
    stage: Path,
    *,
    name: str,
    form: Form,
    source: Path,
    calibration: CalibrationSet | None,
    recipe: Int8Recipe | None,
) -> tuple[TowerFiles, Mapping[str, Any]]:
    """Write a tower's Triton model folder to ``stage``.

    Args:
        source: The tower's FP32 graph.

    Returns:
        The tower's file records, and the recipe of its graph for the manifest.

    Raises:
        ExportError: the graph could not be built, or the configuration does not match it.
    """
    folder = stage / tower_folder_name(name, modality, form.key)
    graph = folder / "1" / _GRAPH
    graph.parent.mkdir(parents=True)
    context_length = towers.text_preprocessing.context_length if modality is Modality.TEXT else 1
    rows = max_batch_size(modality, form.opened_by[0])
    how = form.make(
        GraphRequest(
            modality,
            source,
            graph,
            f"{folder.name}.data",
            max_batch_size=rows,
            context_length=context_length,
            calibration=calibration,
            recipe=recipe,
            kept_rows=towers.kept.rows if towers.kept and modality is Modality.TEXT else None,
        )
    )
    kept = towers.kept if modality is Modality.TEXT else None
    if kept is not None:
        keep_token_rows(graph, kept.rows, data_name=f"{folder.name}.data")
    config = tower_config(
        folder,
        graph,
        engine=form.opened_by[0],
        precision=form.precision,
        fingerprint=towers.fingerprint,
        max_batch_size=rows,
        context_length=context_length,
        vocabulary_size=towers.n_tokens if modality is Modality.TEXT else None,
        plan=graph.with_name(PLAN) if form.engine is Engine.TENSORRT else None,
    )
    check_against_graph(config, graph)
    (folder / CONFIG_FILE).write_text(config.to_pbtxt(), encoding="utf-8")
    if modality is Modality.TEXT:
        (folder / TOKENIZER_FILE).write_text(towers.tokenizer_json, encoding="utf-8")
    if kept is not None:
        whole = kept.whole.tokenizer_json.encode("utf-8")
        (folder / WHOLE_TOKENIZER_FILE).write_bytes(gzip.compress(whole, mtime=0))
    model = onnx.load(str(graph), load_external_data=False)
    return TowerFiles(
        model=folder.name,
        version=1,
        graph=config.filename,
        inputs=input_names(towers, modality),
        outputs={str(dim): output_name(dim, towers.dim) for dim in towers.dims},
        opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
        ir_version=model.ir_version,
        max_batch_size=rows,
        files=tuple(_records(stage, folder)),
    ), how


def _records(stage: Path, folder: Path) -> Iterator[FileRecord]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield record_of_file(stage, path)
