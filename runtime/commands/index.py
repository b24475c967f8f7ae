"""``babeltower index``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from runtime.commands.options import AsJson, json_text
from runtime.errors import InputError
from runtime.indexes.plan import Kind, Refinement, Settings

__all__ = ["index"]

_IVF_PQ, _HNSW, _MEASURE, _UPDATE = "ivf-pq", "hnsw", "Measurement", "Update"


_NAMED = 5
"""Unknown ids that are named; the others are counted."""


def index(
    vectors: Annotated[
        Path,
        typer.Argument(metavar="VECTORS", help="Folder written by babeltower embed, or one of its files."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="INDEX", help="Folder to write.")],
    kind: Annotated[
        Kind,
        typer.Option(
            help="flat: exhaustive search; ivf-pq: inverted lists of short codes; hnsw: a graph; "
            "cascade: bits, then int8, then stored rows."
        ),
    ] = Kind.FLAT,
    lists: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_IVF_PQ, help="Inverted lists; default: 4·√rows.")
    ] = None,
    code_bytes: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_IVF_PQ, help="Bytes per code; default: width/4.")
    ] = None,
    refine: Annotated[
        Refinement | None,
        typer.Option(rich_help_panel=_IVF_PQ, help="Copy of every row for re-ranking; default: int8."),
    ] = None,
    training_rows: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_IVF_PQ, help="Training rows.")
    ] = None,
    neighbours: Annotated[
        int | None, typer.Option(min=2, rich_help_panel=_HNSW, help="Neighbours per row; default: 32.")
    ] = None,
    build_width: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_HNSW, help="Candidates while building; default: 128."),
    ] = None,
    effort: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_MEASURE, help="Lists or candidates per search; default: measured."
        ),
    ] = None,
    recall: Annotated[
        float, typer.Option(min=0, max=1, rich_help_panel=_MEASURE, help="Target recall@10.")
    ] = 0.99,
    queries: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_MEASURE,
            metavar="VECTORS",
            help="Query vectors for the measurement; default: held-out rows.",
        ),
    ] = None,
    n_queries: Annotated[
        int, typer.Option("--n-queries", min=1, rich_help_panel=_MEASURE, help="Queries in the measurement.")
    ] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random sampling.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, envvar="BABELTOWER_THREADS", help="Default: every core.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing index.")] = False,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            rich_help_panel=_UPDATE,
            help="Add the new files of VECTORS to INDEX, and remove the rows of files that are gone.",
        ),
    ] = False,
    remove: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_UPDATE, help="With --update: remove these ids, one a line."
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            rich_help_panel=_UPDATE,
            help="With --update: make all rows one segment.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build a FAISS index over embedded vectors, and measure its recall against exact search."""
    from runtime.indexes.build import index_from_vectors
    from runtime.indexes.summary import lines_of_progress, text_from_record

    if (merge or remove is not None) and not update:
        raise InputError("--remove and --merge change an index. Pass --update as well.")
    if update:
        _update(vectors, out, remove=remove, merge=merge, threads=threads, as_json=as_json)
        return
    settings = Settings(
        n_lists=lists,
        code_bytes=code_bytes,
        refine=refine,
        n_training_rows=training_rows,
        n_neighbours=neighbours,
        build_width=build_width,
        effort=effort,
    )
    record = index_from_vectors(
        vectors,
        out,
        kind=kind,
        settings=settings,
        queries=queries,
        n_queries=n_queries,
        target_recall=recall,
        seed=seed,
        threads=threads,
        replace=replace,
        progress=lines_of_progress(lambda line: typer.echo(line, err=True)),
    )
    typer.echo(json_text(asdict(record)) if as_json else text_from_record(record, out))


def _update(
    vectors: Path, out: Path, *, remove: Path | None, merge: bool, threads: int | None, as_json: bool
) -> None:
    from runtime.indexes.summary import lines_of_progress, text_from_record
    from runtime.indexes.update import merge_segments, update_index

    progress = lines_of_progress(lambda line: typer.echo(line, err=True))
    ids: frozenset[str] = frozenset()
    if remove is not None:
        try:
            lines = remove.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{remove} is not UTF-8 ({error}). Write one id a line.") from error
        ids = frozenset(line.removesuffix("\r") for line in lines if line.strip())
    change = update_index(out, vectors, remove=ids, threads=threads, progress=progress)
    record = merge_segments(out, threads=threads, progress=progress) if merge else change.record
    if as_json:
        data = {"added": change.added, "removed": change.removed, "unknown_ids": list(change.unknown_ids)}
        typer.echo(json_text({**data, "seconds": change.seconds, "record": asdict(record)}))
        return
    unknown = _words_on_unknown(change.unknown_ids)
    typer.echo(f"{change.added:,} rows added, {change.removed:,} removed{unknown}, in {change.seconds:.1f} s")
    typer.echo(text_from_record(record, out))


def _words_on_unknown(ids: tuple[str, ...]) -> str:
    """Name the first ids to remove that the index does not hold, and count them; empty if there are none."""
    if not ids:
        return ""
    more = f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else ""
    return f"; {len(ids):,} ids to remove are not in it: {', '.join(map(repr, ids[:_NAMED]))}{more}"
