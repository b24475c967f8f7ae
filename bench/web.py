"""Measure pages of ``--layout web`` in Chromium: bytes to fetch, seconds until the first query, queries.

    python -m bench.web [MODEL …] --languages por,eng,spa --work FOLDER --json bench/results/web.json

Pages are served from a folder on this machine, so that loading is computation, not a network. ``--published``
takes published variants with random weights, and a tokenizer with as many merges as theirs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.markdown import Markdown

from bench.models.web_pages import page_folder
from bench.records.record import Record, record_of, write_records
from bench.reporting.web_table import web_table
from bench.timing.web_page import figures_of_page, opened_chromium

__all__ = ["cells_of_page"]

FAMILIES = ("nllb-clip", "capivara", "altclip")
TEXTS = ("apple", "a black cat", "three people on a boat", "sunset over the sea", "red car") * 4
_MODEL = ("graph", "weights", "tokenizer")


def cells_of_page(folder: Path, model: str, languages: str, *, openings: int) -> Iterator[Record]:
    """Open a page several times; yield one record a figure."""
    site = json.loads((folder / "site.json").read_text(encoding="utf-8"))
    assets = site["assets"]
    sizes: dict[str, tuple[str, Sequence[float]]] = {
        "tokens": ("tokens", [site["text"]["n_tokens"]]),
        "model": ("bytes", [sum(assets[name]["bytes"] for name in _MODEL if name in assets)]),
        "largest file": ("bytes", [max(file.stat().st_size for file in folder.rglob("*"))]),
    }
    with opened_chromium() as browser:
        found = [figures_of_page(browser, folder, TEXTS) for _ in range(openings)]
    columns = {
        **sizes,
        "fetched": ("bytes", [one.fetched_bytes for one in found]),
        "ready": ("s", [one.ready_s for one in found]),
        "open": ("ms", [one.open_ms for one in found]),
        "check": ("ms", [one.check_ms for one in found]),
        "query": ("ms", [one.query_ms for one in found]),
        "lowest cosine": ("cosine", [one.lowest_cosine for one in found]),
    }
    for figure, (unit, samples) in columns.items():
        cell = {"web": figure, "model": model, "languages": languages}
        yield record_of(cell, list(samples), unit=unit, settings={"threads": 1, "precision": "int8"})


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Samples, or published names.")] = None,
    languages: Annotated[
        list[str] | None,
        typer.Option(help="Languages to keep, such as por,eng,spa, or all; may be repeated."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Published variants, random weights.")
    ] = False,
    work: Annotated[Path, typer.Option(help="Folder for pages; kept.")] = Path("build/web"),
    openings: Annotated[int, typer.Option(min=1)] = 3,
    record: Annotated[Path | None, typer.Option("--json", help="Add the records to this file.")] = None,
) -> None:
    """Measure pages in Chromium."""
    records: list[Record] = []
    for model in models or FAMILIES:
        for codes in languages or ["all", "por,eng,spa"]:
            kept = () if codes == "all" else tuple(codes.split(","))
            folder = page_folder(model, kept, work, published=published)
            records += cells_of_page(folder, model, codes, openings=openings)
            if record is not None:
                write_records(records, record)
    Console(width=160).print(Markdown(web_table(records)))


if __name__ == "__main__":
    typer.run(main)
