"""Memory is bounded by bytes, not by rows: long texts take no more than short ones."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_models import ROOT, Exported

from runtime.corpus import Columns, open_source
from runtime.corpus.rows import Problem

PROGRAM = """
import sys
from corpus_runs import options
from runtime.corpus import embed_corpus
record = embed_corpus(*sys.argv[1:4], options(rows_per_part=32_768, max_bad_share=1.0))
print(record.peak_memory_bytes, record.total.rows, record.total.truncated)
"""


def peak_of(model: Path, source: Path, out: Path) -> tuple[int, int, int]:
    """Peak memory in bytes, rows and cut rows of a run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), str(source), str(out)],
        env={
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    peak, rows, truncated = map(int, done.stdout.split())
    return peak, rows, truncated


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir()
    match path.suffix:
        case ".parquet":  # one row group, its dictionary and pages as long as they get
            pq.write_table(pa.table({"text": texts}), path)
        case ".arrow":
            with pa.ipc.new_file(path, pa.schema({"text": pa.string()})) as file:
                file.write_table(pa.table({"text": texts}))
        case ".jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        case ".csv":
            path.write_text("".join(f"{text}\n" for text in ["text", *texts]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_long_texts_take_no_more_memory_than_short_ones(
    exported: Exported, tmp_path: Path, name: str
) -> None:
    model = exported("nllb-clip")
    write(tmp_path / "short" / name, [f"{i} um gato preto dorme sobre a cama" for i in range(5_000)])
    write(tmp_path / "long" / name, [f"{i} " + "um gato preto " * 70_000 for i in range(150)])
    usual, n_short, _ = peak_of(model, tmp_path / "short" / name, tmp_path / "out-short")
    peak, n_long, truncated = peak_of(model, tmp_path / "long" / name, tmp_path / "out-long")
    assert (n_short, n_long, truncated) == (5_000, 150, 150)
    assert peak < 1.3 * usual


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet", "a.arrow", "a.tar"])
def test_a_text_too_long_to_hold_is_its_rows_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("cells", "lines", "csv_rows", "tables", "tar_samples", "text_lines", "records"):
        monkeypatch.setattr(f"runtime.corpus.sources.{module}.MOST_CHARACTERS", 10_000)
    monkeypatch.setattr("runtime.corpus.sources.parquet_table.PIECE_BYTES", 10_000)
    texts = ["um", 'gato, "preto"\n' * 900 + "x" * 99_000, "x" * 10_001 + "\n", "dorme", "x" * 9_900]
    kinds = ["um", "too-long-text", "too-long-text", "dorme", "x" * 9_900]
    path = tmp_path / "in" / name
    match path.suffix:
        case ".txt":
            path.parent.mkdir()
            texts[1] = texts[1].replace("\n", " ")
            path.write_text("".join(text.strip("\n") + "\n" for text in texts))
        case ".csv":
            texts[1] = texts[1].replace("\n", " ")
            path.parent.mkdir()
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([["text"], *([text] for text in texts)])
        case ".tar":
            path.parent.mkdir()
            with tarfile.open(path, "w") as tar:
                for i, text in enumerate(texts):
                    member = tarfile.TarInfo(f"{i}.txt")
                    member.size = len(text)
                    tar.addfile(member, io.BytesIO(text.encode()))
            kinds[1] = kinds[2] = "too-large-file"
        case _:
            write(path, texts)
    source = open_source(path, columns=Columns(text="txt" if name == "a.tar" else "text"))
    items = [item for piece in source.read(0, lambda start, stop: True) for item in piece.items]
    assert [getattr(item, "kind", item) for item in items] == kinds
    assert all("at most 10,000" in item.reason for item in items if isinstance(item, Problem))


def test_a_line_of_200_megabytes_takes_no_such_memory(exported: Exported, tmp_path: Path) -> None:
    model = exported("nllb-clip")
    write(tmp_path / "short" / "a.jsonl", ["um gato", "preto"])
    (tmp_path / "long").mkdir()
    with (tmp_path / "long" / "a.jsonl").open("w") as file:
        file.write('{"text": "um gato"}\n{"text": "')
        for _ in range(200):
            file.write("um gato " * 125_000)
        file.write('"}\n{"text": "preto"}\n')
    usual, _, _ = peak_of(model, tmp_path / "short" / "a.jsonl", tmp_path / "out-short")
    peak, n_rows, _ = peak_of(model, tmp_path / "long" / "a.jsonl", tmp_path / "out-long")
    assert n_rows == 3
    assert peak < usual + (200 << 20)
