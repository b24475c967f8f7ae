"""Memory is bounded by bytes, not by rows: long texts take no more than short ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sample_models import ROOT, Exported

PROGRAM = """
import sys
from corpus_runs import options
from runtime.corpus import embed_corpus
record = embed_corpus(*sys.argv[1:4], options(rows_per_part=32_768))
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_long_texts_take_no_more_memory_than_short_ones(
    exported: Exported, tmp_path: Path, name: str
) -> None:
    def line(text: str) -> str:
        return json.dumps({"text": text}) if name == "a.jsonl" else text

    head = "" if name == "a.jsonl" else "text\n"
    model = exported("nllb-clip")
    (tmp_path / "short").mkdir()
    (tmp_path / "long").mkdir()
    short = "".join(line(f"{i} um gato preto dorme sobre a cama") + "\n" for i in range(5_000))
    (tmp_path / "short" / name).write_text(head + short)
    with (tmp_path / "long" / name).open("w") as file:
        file.write(head)
        file.writelines(line(f"{i} " + "um gato preto " * 15_000) + "\n" for i in range(150))
    usual, n_short, _ = peak_of(model, tmp_path / "short" / name, tmp_path / "out-short")
    peak, n_long, truncated = peak_of(model, tmp_path / "long" / name, tmp_path / "out-long")
    assert (n_short, n_long, truncated) == (5_000, 150, 150)
    assert peak < 1.3 * usual
