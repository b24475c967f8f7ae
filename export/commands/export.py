"""``babeltower export``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.commands.parity_lines import parity_lines
from export.layouts.names import LayoutName
from runtime.backends.plans import Portability
from runtime.commands.options import device_option
from runtime.commands.summary import lines_from_vocabulary
from runtime.device import device_from_name
from runtime.errors import ExportError
from runtime.extras import needing
from runtime.manifest import Engine, KeptBy, Precision, Variant

if TYPE_CHECKING:
    from export.parity.measure import ParityReport
    from export.repository import Export

__all__ = ["export", "record_of_export", "summary_of_export"]

_TENSORRT = "TensorRT"
_VOCABULARY = "Vocabulary"
_WEB = "Web page (--layout web)"


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder, .ckpt file or hub name of a trained model.")
    ],
    repository: Annotated[
        Path,
        typer.Argument(
            metavar="REPOSITORY",
            help="Triton model repository, or the folder of --layout; created if missing.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the model; the checkpoint's name by default.")
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Precision of the matrix products; may be repeated. Default: fp32; of a web page, int8."
        ),
    ] = None,
    engine: Annotated[
        list[Engine] | None,
        typer.Option(
            help="Inference engine to export for; may be repeated. All installed CPU engines by default."
        ),
    ] = None,
    layout: Annotated[
        LayoutName,
        typer.Option(
            "--layout",
            "--target",
            help="Write a Triton repository, another server's model folder, or a web page that searches.",
        ),
    ] = LayoutName.TRITON,
    base: Annotated[str | None, typer.Option(help="Base checkpoint of a LoRA adapter.")] = None,
    image_tower: Annotated[
        str | None,
        typer.Option(help="Open_clip folder or hub name of the image tower, for M-CLIP's text towers."),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(min=4, help="Maximum text length in tokens; the family's (77) by default.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace existing variants.")] = False,
    texts_per_language: Annotated[
        int, typer.Option(min=1, max=8, help="Probe texts per language for the cosine comparison.")
    ] = 4,
    captions_per_language: Annotated[
        int, typer.Option(min=1, help="Captions per language for the retrieval comparison.")
    ] = 200,
    all_captions: Annotated[
        bool, typer.Option("--all-captions", help="Compare retrieval on all captions.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Parquet file or image folder to calibrate on; the sample set by default."),
    ] = None,
    accept_drop: Annotated[
        float | None,
        typer.Option(min=0.0, max=100.0, help="Recall drop in points to accept beyond the limits; recorded."),
    ] = None,
    languages: Annotated[
        str | None,
        typer.Option(
            metavar="CODES",
            help="Languages to keep, such as por,eng,spa; tokens that their texts do not need are removed.",
            rich_help_panel=_VOCABULARY,
        ),
    ] = None,
    vocabulary_texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Texts whose tokens are kept: .parquet (text, language) or one per line; may be repeated.",
            rich_help_panel=_VOCABULARY,
        ),
    ] = None,
    vocabulary: Annotated[
        KeptBy | None,
        typer.Option(
            help="Keep all tokens of the languages' characters (default), or only those of the texts.",
            rich_help_panel=_VOCABULARY,
        ),
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            metavar="VECTORS",
            help="Folder written by `babeltower embed`, to search; the sample drawings by default.",
            rich_help_panel=_WEB,
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Folder, Parquet file or tars of the gallery's images; default: its recorded source.",
            rich_help_panel=_WEB,
        ),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of --pictures that holds the ids.", rich_help_panel=_WEB)
    ] = None,
    npm_packages: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            help="JavaScript libraries, as `npm pack` writes them or in node_modules; fetched by default.",
            rich_help_panel=_WEB,
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per run; all cores by default.")] = None,
    device: Annotated[
        str | None, device_option("GPU", "For --engine cuda and tensorrt: ", in_environment=False)
    ] = None,
    packed_text: Annotated[
        bool,
        typer.Option(
            "--packed-text",
            help="For --engine cuda: the text tower computes no padding, and captures no CUDA graph.",
            rich_help_panel="GPU",
        ),
    ] = False,
    tensorrt_version_compatible: Annotated[
        bool,
        typer.Option(
            "--tensorrt-version-compatible",
            help="Let later TensorRT releases of the same major version run the plans.",
            rich_help_panel=_TENSORRT,
        ),
    ] = False,
    tensorrt_hardware_compatibility: Annotated[
        Portability, typer.Option(help="Other GPUs that may run the plans.", rich_help_panel=_TENSORRT)
    ] = Portability.NONE,
    tensorrt_timing_cache: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="File of kernel timings, read and written: later builds are faster.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    tensorrt_workspace: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="MIB",
            help="Limit on the kernels' scratch memory in MiB.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    tensorrt_optimization_level: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=5,
            help="Effort of the builder: higher levels try more kernels.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export both towers, check parity with PyTorch and publish REPOSITORY/NAME.

    Exit code 0 means that every variant passed the parity check and the model is published. A variant that
    fails is not published; its report is written to REPOSITORY/NAME.VARIANT.refused.json. A variant that
    this machine cannot build or measure is refused at once; the others are published.
    """
    with needing("Exporting", "babeltower[export]"):
        from rich.console import Console

        from export.repository import ExportOptions, installed_engines, repository_from_checkpoint
        from export.tensorrt.options import EngineOptions
        from export.variants import forms_for, possible_forms
        from export.vocabulary.selection import VocabularyOptions, languages_from_list

    from export.commands.layouts import export_layout, layout_from_options, require_engine
    from export.commands.progress import progress_bars

    plans = EngineOptions(
        portability=tensorrt_hardware_compatibility,
        version_compatible=tensorrt_version_compatible,
        workspace_bytes=None if tensorrt_workspace is None else tensorrt_workspace << 20,
        optimization_level=tensorrt_optimization_level,
        timing_cache=tensorrt_timing_cache,
    )
    chosen = layout_from_options(
        layout, gallery=gallery, pictures=pictures, id_column=id_column, npm_packages=npm_packages
    )
    if chosen is not None:
        engine = require_engine(chosen, engine)
    wanted = forms_for(
        precision or [Precision.FP32 if chosen is None else chosen.precision],
        engine or [],
        installed=installed_engines(),
        tensorrt=None if plans == EngineOptions() else plans,
        packed_text=packed_text,
        device=None if device is None else device_from_name(device),
    )
    forms, refused = possible_forms(wanted)
    for key, reason in refused.items():
        typer.echo(f"{key} cannot be built here: {reason}", err=True)
    made = {form.precision for form in forms}
    missing = [form.key for form in wanted if form.key in refused and (engine or form.precision not in made)]
    if not forms:
        raise ExportError(f"Nothing was exported: {' '.join(refused.values())}")
    if languages is None and (vocabulary_texts or vocabulary is not None):
        raise ExportError("Options of the vocabulary need the languages to keep; add --languages CODES.")
    options = ExportOptions(
        forms=forms,
        replace=replace,
        texts_per_language=texts_per_language,
        captions_per_language=None if all_captions else captions_per_language,
        calibration=calibration,
        accept_drop=None if accept_drop is None else accept_drop / 100,
        vocabulary=None
        if languages is None
        else VocabularyOptions(
            languages_from_list(languages), tuple(vocabulary_texts or ()), vocabulary or KeptBy.CHARACTERS
        ),
        threads=threads,
    )
    if chosen is not None:
        export_layout(
            checkpoint,
            repository,
            chosen,
            name=name,
            base=base,
            image_tower=image_tower,
            context_length=context_length,
            options=options,
            as_json=as_json,
        )
        return
    with progress_bars(Console(stderr=True)) as progress:
        done = repository_from_checkpoint(
            checkpoint,
            repository,
            name=name,
            base=base,
            image_tower=image_tower,
            context_length=context_length,
            options=options,
            progress=progress,
        )
    typer.echo(json.dumps(record_of_export(done), ensure_ascii=False) if as_json else summary_of_export(done))
    if missing:
        raise ExportError(
            f"{', '.join(missing)} cannot be built on this machine, for the reason above, and was not "
            f"published. Published variants: {', '.join(done.parity)}."
        )


def record_of_export(done: Export) -> dict[str, object]:
    return {
        "model": str(done.model),
        "fingerprint": done.manifest.fingerprint,
        "family": done.manifest.family,
        "dims": [done.manifest.dim, *done.manifest.mrl_dims],
        "dropped": dict(done.dropped),
        "vocabulary": [dataclasses.asdict(kept) for kept in done.manifest.vocabulary],
        "parity": {key: report.as_json() for key, report in done.parity.items()},
        "seconds": {step: round(seconds, 2) for step, seconds in done.seconds.items()},
    }


def summary_of_export(done: Export) -> str:
    manifest = done.manifest
    lines = [
        f"published    {done.model}",
        f"model        {manifest.family}, {manifest.architecture}",
        f"vectors      {manifest.dim} wide"
        + (f", MRL heads {list(manifest.mrl_dims)}" if manifest.mrl_dims else ""),
        f"fingerprint  {manifest.fingerprint}",
    ]
    for kept in manifest.vocabulary:
        lines += [f"vocabulary   {line}" for line in lines_from_vocabulary(dataclasses.asdict(kept))]
    for key, report in done.parity.items():
        lines += _variant_lines(manifest.variants[key], key, report)
    lines += [f"removed      {key} of an earlier export: {why}" for key, why in done.dropped.items()]
    lines.append(
        "seconds      " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in done.seconds.items())
    )
    return "\n".join(lines)


def _variant_lines(variant: Variant, key: str, report: ParityReport) -> Iterator[str]:
    size = sum(record.size_bytes for tower in (variant.text, variant.image) for record in tower.files)
    yield f"{key:<12} {size / 1e6:,.1f} MB on disk"
    yield from parity_lines(report)
