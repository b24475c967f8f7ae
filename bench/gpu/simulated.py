"""Pass the samples' graphs for CUDA through the gate without a GPU: 16-bit values are rounded in FP32.

    python -m bench.gpu simulate

What a GPU adds is the order of its sums. Every caption and drawing of the samples is embedded.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.gpu.gate import PACKED, PACKED_PRECISION, REFERENCE, GateForm, embed_model, judge_model
from bench.gpu.lines import LINES, Bench, read_lines
from bench.gpu.results import records_of_line
from bench.gpu.samples import sample_repository
from bench.models.full_size import in_process
from bench.records.record import Record
from export.precision.calibration import samples_folder
from export.precision.simulation import simulated_from_onnx
from runtime.errors import BabeltowerError
from runtime.manifest import (
    Engine,
    Manifest,
    Modality,
    Precision,
    manifest_path,
    record_of_file,
    variant_name,
)

__all__ = ["SIMULATED", "SIMULATED_FORMS", "judge_simulated", "simulated_form", "simulated_model"]

SIMULATED = (Precision.FP16, Precision.BF16)
"""Precisions of the graphs for CUDA that a processor can only simulate."""


SIMULATED_FORMS = (*(precision.value for precision in SIMULATED), PACKED)
"""Names of the simulated forms; packed texts are in FP16."""


def judge_simulated(
    work: Path, samples: Sequence[str], names: Sequence[str], say: Callable[[str], None]
) -> list[Record]:
    """Judge samples in each simulated form; vectors and graphs are kept in ``work``.

    Args:
        names: Some of ``SIMULATED_FORMS``.

    Returns:
        A record per sample, form and direction, of R@1 beside the reference's.

    Raises:
        BabeltowerError: a form is unknown.
    """
    if unknown := [name for name in names if name not in SIMULATED_FORMS]:
        raise BabeltowerError(f"Form {unknown[0]!r} is unknown; expected some of {list(SIMULATED_FORMS)}.")
    lines = work / LINES
    lines.unlink(missing_ok=True)
    folder = work / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    if not (emoji := folder / "emoji").exists():
        emoji.symlink_to(samples_folder())
    sample_repository(folder / "repository", samples)
    bench = Bench(work, work, work, dry=False, ends_at=float("inf"))
    for name in samples:
        forms = [REFERENCE]
        for kind in names:
            packs = kind == PACKED
            precision = PACKED_PRECISION if packs else Precision(kind)
            forms.append(simulated_form(precision, packed=packs))
            source = folder / "repository" / (PACKED if packs else "") / name
            in_process(simulated_model, source, folder / forms[-1].folder, precision)
        for form in forms:
            started = time.monotonic()
            in_process(embed_model, bench, name, form)
            say(f"{name} {form.name}: embedded in {time.monotonic() - started:.0f} s")
        in_process(judge_model, bench, name, forms)
    return [record for line in read_lines(lines) for record in records_of_line(line)]


def simulated_form(precision: Precision, *, packed: bool = False) -> GateForm:
    """Return the form that opens what ``simulated_model`` wrote for a precision."""
    name = f"simulated {precision.value}{' packed' if packed else ''}"
    return GateForm(
        name,
        precision,
        Engine.ONNXRUNTIME,
        folder=name.replace(" ", "-"),
        opened_as=Precision.FP32,
    )


def simulated_model(model: Path, repository: Path, precision: Precision) -> None:
    """Write a model whose FP32 variant simulates its variant for CUDA in a precision.

    Args:
        model: Model with that variant.
        repository: Folder to write it to.
        precision: FP16 or BF16.
    """
    manifest = Manifest.read(model)
    source = manifest.variants[variant_name(precision, Engine.CUDA.value)]
    repository.mkdir(parents=True, exist_ok=True)
    towers = {}
    for modality in Modality:
        files = source.tower(modality)
        target = repository / files.model / str(files.version) / files.graph
        shutil.rmtree(repository / files.model, ignore_errors=True)
        target.parent.mkdir(parents=True)
        simulated_from_onnx(
            model.parent / files.model / str(files.version) / files.graph, target, data_name="model.data"
        )
        records = tuple(record_of_file(repository, path) for path in sorted(target.parent.iterdir()))
        towers[modality] = dataclasses.replace(files, files=records)
    tokenizer = repository / source.tokenizer
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(model.parent / source.tokenizer, tokenizer)
    variant = dataclasses.replace(
        source,
        precision=Precision.FP32,
        engines=(Engine.ONNXRUNTIME.value,),
        text=towers[Modality.TEXT],
        image=towers[Modality.IMAGE],
    )
    listed = dataclasses.replace(manifest, variants={"fp32": variant})
    manifest_path(repository / manifest.name).write_text(listed.to_json(), encoding="utf-8")
