"""Measure a published text tower with the vocabulary of a few languages: sizes, memory, equal vectors.

    python -m bench.pruned [VARIANT] --languages por,eng,spa --work FOLDER --json bench/results/pruned.json

The whole model and the pruned one have the same random weights, in INT8, and a sample's tokenizer grown to
the published number of tokens. Both embed the samples' captions of the kept languages; exit code 1 if a
vector differs by a bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.markdown import Markdown

from bench.models.immich_models import served_repository
from bench.records.record import Record, record_of, write_records
from bench.reporting.pruned_table import pruned_table
from bench.timing.embedded_captions import embedded_captions
from runtime.manifest import TOKENIZER_FILE, WHOLE_TOKENIZER_FILE, Manifest, Precision, Variant
from samples import dataset

__all__ = ["captions_of", "cells_of_model"]

_PRECISION = Precision.INT8
_PARTS = {
    "graph": (".onnx", ".data"),
    "tokenizer": (f"/{TOKENIZER_FILE}",),
    "tokenizer of the checkpoint": (f"/{WHOLE_TOKENIZER_FILE}",),
}
"""Parts of a text tower, and how their files' names end."""


def captions_of(languages: Sequence[str], each: int) -> list[tuple[str, str]]:
    """Return captions and their FLORES-200 codes, ``each`` of a language, evenly spread."""
    found = []
    for code in languages:
        captions = dataset.load_captions(code)
        found += [(one.text, code) for one in captions[:: max(1, len(captions) // each)][:each]]
    return found


def cells_of_model(
    repository: Path, variant: str, languages: str, captions: Sequence[tuple[str, str]]
) -> tuple[list[Record], NDArray[np.float32]]:
    """Measure one repository; return its records and the vectors of captions."""
    manifest = Manifest.read(repository / variant)
    (chosen,) = manifest.variants.values()
    sizes = dict.fromkeys(_PARTS, 0)
    for record in chosen.text.files:
        part = next((one for one, names in _PARTS.items() if record.path.endswith(names)), None)
        if part is not None:
            sizes[part] += record.size_bytes
    embedded = embedded_captions(repository / variant, chosen.precision, captions)
    n_tokens = manifest.vocabulary[0].n_tokens if manifest.vocabulary else _whole_tokens(repository, chosen)
    figures: dict[str, tuple[str, float]] = {
        **{f"{part} on disk": ("MB", n_bytes / 1e6) for part, n_bytes in sizes.items()},
        "resident": ("MB", embedded.resident_bytes / 1e6),
        "resident without a model": ("MB", embedded.before_bytes / 1e6),
    }
    settings = {"weights": "random", "n_tokens": n_tokens, "captions": len(captions)}
    cells = [
        record_of(
            {"pruned": figure, "model": variant, "languages": languages},
            [value],
            unit=unit,
            settings=settings,
        )
        for figure, (unit, value) in figures.items()
    ]
    return cells, embedded.vectors


def _whole_tokens(repository: Path, variant: Variant) -> int:
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(repository / variant.tokenizer)).get_vocab_size())


def _equal(
    whole: NDArray[np.float32], pruned: NDArray[np.float32], variant: str, languages: str
) -> Iterator[Record]:
    n_equal = int((whole == pruned).all(axis=1).sum())
    cell = {"pruned": "equal vectors", "model": variant, "languages": languages}
    yield record_of(cell, [100 * n_equal / len(whole)], unit="%", settings={"captions": len(whole)})


def main(
    variant: Annotated[str, typer.Argument(help="A published variant.")] = "nllb-clip-base-siglip",
    languages: Annotated[str, typer.Option(help="Languages to keep.")] = "por,eng,spa",
    work: Annotated[Path, typer.Option(help="Folder for models, up to 5 GB; kept.")] = Path("full-size"),
    each: Annotated[int, typer.Option(min=1, help="Captions of each language.")] = 400,
    record: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
) -> None:
    """Measure a published text tower with the vocabulary of a few languages."""
    from runtime.preprocessing.languages import flores_from_code

    kept = tuple(languages.split(","))
    captions = captions_of([flores_from_code(code) for code in kept], each)
    records, of_whole = cells_of_model(served_repository(variant, _PRECISION, work), variant, "all", captions)
    pruned = served_repository(variant, _PRECISION, work, languages=kept)
    cells, of_pruned = cells_of_model(pruned, variant, languages, captions)
    records += [*cells, *_equal(of_whole, of_pruned, variant, languages)]
    if record is not None:
        write_records(records, record)
    Console(width=140).print(Markdown(pruned_table(records)))
    raise typer.Exit(0 if records[-1].median == 100 else 1)


if __name__ == "__main__":
    typer.run(main)
