"""What the tests of corpora share: small corpora, options that make many small parts, and reading it back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from runtime.corpus import EngineChoice, Options
from runtime.manifest import Engine, Precision

BY_HAND = EngineChoice(Engine.ONNXRUNTIME, Precision.FP32, instances=2, threads=1)
N_KILLS = int(os.environ.get("BABELTOWER_KILLS", "6"))
"""Kills in each test that kills runs again and again; a few by default, for a run of minutes."""

N_FAULTY_RUNS = int(os.environ.get("BABELTOWER_FAULTY_RUNS", "2"))
"""Runs in each test of storage that fails at random."""

WORDS = ("gato", "preto", "a", "red", "house", "猫", "σκύλος", "небо", "two", "três", "bird", "under", "the")


def options(**changes: Any) -> Options:
    return Options(**{"engine": BY_HAND, "rows_per_part": 64, "language": "en", **changes})


def sentences(n: int, *, seed: int = 0) -> list[str]:
    """Texts of 1 to 30 words, one in eight an exact copy of an earlier one."""
    random = np.random.default_rng(seed)
    texts: list[str] = []
    for i in range(n):
        if i > 8 and random.random() < 1 / 8:
            texts.append(texts[int(random.integers(max(0, i - 40), i))])
        else:
            texts.append(f"{i} " + " ".join(random.choice(WORDS, int(random.integers(1, 30)))))
    return texts


def write_texts(path: Path, texts: list[Any], **columns: list[Any]) -> Path:
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=50)
    return path


def write_gapped(folder: Path, n_rows: int) -> Path:
    """Write a table of sentences with ids, two of whose texts are missing."""
    texts: list[Any] = sentences(n_rows)
    texts[100] = texts[333] = None
    return write_texts(folder / "a.parquet", texts, id=[f"row {i}" for i in range(n_rows)])


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def output_of(folder: Path) -> tuple[list[Any], NDArray[Any]]:
    """Ids and vectors of all parts, in order."""
    tables = [pq.read_table(path) for path in parts_of(folder)]
    table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    column = table["vector"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
    return table["id"].to_pylist(), vectors


def bad_rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        row
        for path in sorted((folder / "_bad-rows").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of vectors and bad rows; the journal's and the record's bytes differ."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".parquet", ".npy", ".part")
    }


def emptied(folder: Path) -> None:
    """Remove all that is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def journal_of(folder: Path) -> list[dict[str, Any]]:
    """Entries of the journal, the run's before the parts'."""
    paths = sorted((folder / "_journal").glob("run.*.json")) + sorted(
        (folder / "_journal").glob("part-*.json")
    )
    return [json.loads(path.read_text()) for path in paths]
