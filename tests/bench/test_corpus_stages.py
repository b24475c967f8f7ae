"""Every stage of a corpus is measured on a sample, and so is the pipeline."""

from __future__ import annotations

import pytest
from rich.console import Console
from sample_models import Exported

from bench.corpora import stages as corpus_stages
from bench.corpora.stages import STAGES, Corpus, measure_stages, print_stages
from bench.models.sample_exports import SampleExport


def test_every_stage_has_its_rate(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        corpus_stages, "sample_export", lambda name, precisions: SampleExport(exported(name), {})
    )
    console = Console(width=120, record=True, quiet=True)
    records = measure_stages("nllb-clip", Corpus(n_texts=96, n_images=8, turns=2), console)
    found = {(r.cell["tower"], r.cell["load"]) for r in records}
    whole = ("pipeline", "pipeline by CPU")
    assert found == {
        (modality.value, name) for modality, stages in STAGES.items() for name in (*stages, *whole)
    }
    assert all(len(r.samples) == 2 and min(r.samples) > 0 for r in records)
    for record in records:
        by_cpu = record.cell["load"] != "pipeline"
        assert record.unit == ("rows/core-second" if by_cpu else "rows/s")
    by_stage = {(r.cell["tower"], r.cell["load"]): r.median for r in records}
    assert by_stage["image", "pipeline by CPU"] < by_stage["image", "decode"]
    print_stages(records, console)
