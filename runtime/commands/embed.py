"""The command ``embed``."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from runtime.commands.options import (
    ca_file_option,
    cache_option,
    connection_to_model,
    device_option,
    token_file_option,
)
from runtime.corpus.faults import PATIENCE_S
from runtime.device import Device, device_from_name
from runtime.embeddings import Encoding
from runtime.errors import CorpusError, InputError
from runtime.manifest import Engine, Precision, choice_from_value

__all__ = ["embed"]

_SOURCE, _TOWER, _OUTPUT, _SCALE = "Source", "Tower", "Output", "Scale and watch"
_SERVER = "Server, if MODEL is an address"


class Runner(str, Enum):
    """Executor of the run: this process or Ray Data."""

    LOCAL = "local"
    RAY = "ray"


def embed(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="REPOSITORY/NAME of an exported model, or a server's address."),
    ],
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files, folders, patterns (*, {000..123}) or URLs of one format, or - for standard input: "
            "Parquet, Arrow, CSV, JSONL, text, images, tars, datasets.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Output folder or URL (s3://…); run again to resume, also at once elsewhere to share it.",
        ),
    ],
    text: Annotated[
        str | None, typer.Option("--text", "--text-column", rich_help_panel=_SOURCE, help="Column of texts.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image", "--image-column", rich_help_panel=_SOURCE, help="Column of images: bytes or paths."
        ),
    ] = None,
    id_: Annotated[
        str | None,
        typer.Option(
            "--id",
            "--id-column",
            rich_help_panel=_SOURCE,
            help="Column of ids; none: row numbers. Default: a usual name, such as id.",
        ),
    ] = None,
    language: Annotated[
        str | None, typer.Option(rich_help_panel=_SOURCE, help="Language of texts without one.")
    ] = None,
    language_column: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SOURCE,
            help="Column of language codes, or none. Default: a usual name, such as language.",
        ),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            rich_help_panel=_SOURCE,
            help="parquet, arrow, csv, jsonl, text, images, webdataset or datasets; default: by suffix.",
        ),
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SOURCE, help="CSV: field separator; default: tab for .tsv, else comma."
        ),
    ] = None,
    quote: Annotated[
        str | None,
        typer.Option(rich_help_panel=_SOURCE, help='CSV: quotation mark, or none; default: ".'),
    ] = None,
    escape: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SOURCE,
            help='CSV: character that escapes quotation marks, such as \\, or none; default: files with \\" '
            "are refused.",
        ),
    ] = None,
    text_encoding: Annotated[
        str | None,
        typer.Option(
            "--text-encoding",
            rich_help_panel=_SOURCE,
            help="CSV, JSONL, text: encoding; default: by byte order mark, else UTF-8.",
        ),
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(
            metavar="first|each",
            rich_help_panel=_SOURCE,
            help="Lists of texts: embed the first, or each as a row with the id ID#0, ID#1, …",
        ),
    ] = None,
    id_type: Annotated[
        str | None,
        typer.Option(
            metavar="string|int64",
            rich_help_panel=_SOURCE,
            help="Stored type of ids; default: int64 if all files hold integers.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(rich_help_panel=_SOURCE, help="Name of standard input, by which a run is resumed."),
    ] = None,
    skip_bad_files: Annotated[
        bool,
        typer.Option(
            "--skip-bad-files",
            rich_help_panel=_SOURCE,
            help="Set aside damaged files, and call rows bad whose files cannot be read.",
        ),
    ] = False,
    patience: Annotated[
        float,
        typer.Option(
            min=0, rich_help_panel=_SOURCE, help="Seconds for which a fault of storage is tried again."
        ),
    ] = PATIENCE_S,
    retry_bad: Annotated[
        str,
        typer.Option(
            metavar="KIND,…",
            rich_help_panel=_SOURCE,
            help="Embed finished parts again that have bad rows of these kinds.",
        ),
    ] = "",
    recheck_input: Annotated[
        bool,
        typer.Option(
            "--recheck-input",
            rich_help_panel=_SOURCE,
            help="The source was changed: read finished parts again, and embed those whose rows differ.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", rich_help_panel=_SOURCE, help="Print files, columns, rows and an estimate, and stop."
        ),
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            envvar="BABELTOWER_ENGINE",
            rich_help_panel=_TOWER,
            help="onnxruntime, openvino, cuda or tensorrt; default: the fastest measured on the device.",
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(envvar="BABELTOWER_PRECISION", rich_help_panel=_TOWER, help="Default: measured."),
    ] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_TOWER, help="Concurrent runs; default: measured.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="BABELTOWER_THREADS",
            rich_help_panel=_TOWER,
            help="Threads per run; default: measured.",
        ),
    ] = None,
    device: Annotated[str | None, device_option(_TOWER)] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_TOWER,
            help="Texts × padded length per batch; default: 1,024, and 16,384 on a GPU.",
        ),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(rich_help_panel=_OUTPUT, help="Vector width; default: full.")
    ] = None,
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="float32|float16|int8|binary",
            rich_help_panel=_OUTPUT,
            help="Storage format of the vectors; another name, such as utf-16, is that of --text-encoding.",
        ),
    ] = None,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            rich_help_panel=_OUTPUT,
            help="Embed files that were added to the source after all others; index --update follows.",
        ),
    ] = False,
    keep: Annotated[
        str,
        typer.Option(
            metavar="COLUMN,…",
            rich_help_panel=_OUTPUT,
            help="Columns to write beside the vectors; search shows them and filters by them.",
        ),
    ] = "",
    npy: Annotated[
        bool, typer.Option("--npy", rich_help_panel=_OUTPUT, help="Also write each part as an array in _npy.")
    ] = False,
    rows_per_part: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=_OUTPUT,
            help="Source rows per output file; duplicates within a file are embedded once.",
        ),
    ] = 32_768,
    max_bad_share: Annotated[
        float,
        typer.Option(min=0, max=1, rich_help_panel=_OUTPUT, help="Stop above this share of bad rows."),
    ] = 0.5,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N", rich_help_panel=_SCALE, help="Process every N-th part, starting at I (from 0)."
        ),
    ] = "0/1",
    accept_changed: Annotated[
        str,
        typer.Option(
            metavar="engine,cpu,libraries",
            rich_help_panel=_SCALE,
            help="Resume although these differ from the existing parts; the journal records the change.",
        ),
    ] = "",
    runner: Annotated[
        Runner,
        typer.Option(rich_help_panel=_SCALE, help="Run in this process, or with Ray Data on a cluster."),
    ] = Runner.LOCAL,
    workers: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_SCALE, help="Ray actors; default: one per core.")
    ] = None,
    lease: Annotated[
        float,
        typer.Option(
            rich_help_panel=_SCALE,
            help="Seconds without a sign of life after which another process takes over a process's parts.",
        ),
    ] = 60.0,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, rich_help_panel=_SCALE, help="Port for Prometheus metrics."),
    ] = None,
    cache: Annotated[Path | None, cache_option(_SCALE)] = None,
    token_file: Annotated[Path | None, token_file_option(_SERVER, "sent with every request")] = None,
    ca_file: Annotated[Path | None, ca_file_option(_SERVER)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's record as JSON.")] = False,
) -> None:
    """Embed a corpus of texts or images into Parquet files, exactly once.

    Run the same command again after an interruption: it resumes, and the output is the same.
    Rows that cannot be embedded are listed in OUT/_bad-rows, each with its reason.
    """
    if engine == "ray":  # Ray runs the job; it is not an engine of the tower
        engine, runner = None, Runner.RAY
    from runtime.corpus import Columns, EngineChoice, Locations, Options, Reading, Shard, embed_corpus
    from runtime.corpus.computation import ComputationChange
    from runtime.corpus.metrics import metrics_served
    from runtime.corpus.outlook import lines_of_outlook
    from runtime.corpus.progress import progress_bar, summary_of_run
    from runtime.corpus.rows import IdType
    from runtime.corpus.sources import CaptionUse, source_format

    vectors_as, text_as = _encodings(encoding or [], text_encoding)
    options = Options(
        columns=Columns(id_, text, image, language_column),
        format=None if format_ is None else source_format(format_),
        reading=Reading(
            delimiter=None if delimiter is None else delimiter.replace("\\t", "\t"),
            quote=quote,
            escape=escape,
            encoding=text_as,
            captions=None if captions is None else choice_from_value(CaptionUse, captions, "Use of captions"),
            id_type=None if id_type is None else choice_from_value(IdType, id_type, "Id type"),
            skip_bad_files=skip_bad_files,
            patience_s=patience,
        ),
        name=name,
        language=language,
        dim=dim,
        encoding=vectors_as,
        engine=EngineChoice(_engine(engine), precision, instances, threads, device=_device(device)),
        rows_per_part=rows_per_part,
        max_batch_tokens=max_batch_tokens,
        max_bad_share=max_bad_share,
        shard=Shard(*_shard(shard)),
        accept_changed=tuple(
            choice_from_value(ComputationChange, name, "Change") for name in _names(accept_changed)
        ),
        append=append,
        keep=tuple(_names(keep)),
        retry_bad=tuple(_names(retry_bad)),
        recheck_input=recheck_input,
        npy=npy,
        lease_s=lease,
        cache=cache,
        connection=connection_to_model(model, token_file, ca_file),
    )
    locations = Locations(source)
    if dry_run:
        for line in lines_of_outlook(model, locations, out, options):
            typer.echo(line)
        return
    with metrics_served(metrics_port) as watcher, progress_bar(inner=watcher) as (_, shown):
        execute = None
        if runner is Runner.RAY:
            from runtime.corpus.ray_runner import ray_executor

            execute = ray_executor(workers)
        record = embed_corpus(model, locations, out, options, watcher=shown, execute=execute)
    if as_json:
        data = {**dataclasses.asdict(record), "padding_share": record.padding_share}
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        typer.echo(summary_of_run(record))


def _encodings(given: list[str], text: str | None) -> tuple[Encoding, str | None]:
    """Return the encoding of the vectors and of the source's text; no name belongs to both."""
    known = {encoding.value for encoding in Encoding}
    vectors = [name for name in given if name in known]
    texts = [name for name in given if name not in known] + ([] if text is None else [text])
    if len(vectors) > 1 or len(texts) > 1:
        raise InputError(
            f"--encoding is given as {given}; expected one of {sorted(known)} for the vectors, and at most "
            "one encoding of the source's text."
        )
    return Encoding(vectors[0]) if vectors else Encoding.FLOAT32, texts[0] if texts else None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _engine(name: str | None) -> Engine | None:
    if name is None or name == "auto":
        return None
    try:
        return Engine(name)
    except ValueError:
        known = [engine.value for engine in Engine]
        raise InputError(f"Engine {name!r} is unknown; expected one of {known}, auto, or ray.") from None


def _device(name: str | None) -> Device | None:
    return None if name is None else device_from_name(name)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.strip().isdigit() and count.strip().isdigit()):
        raise CorpusError(f"Invalid shard {text!r}; expected i/n, e.g. 0/4 for the first of four.")
    return int(index), int(count)
