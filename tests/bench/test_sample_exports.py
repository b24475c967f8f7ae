"""When an exported sample counts, and when it is made anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sample_models import CHECKPOINTS

from bench.models import sample_exports
from bench.models.sample_exports import FAMILIES, sample_export
from runtime.errors import DatasetError
from runtime.manifest import Precision

PRECISIONS = (Precision.FP32, Precision.INT8)


class Exporter:
    """Stands for the export: notes what was asked, and leaves the variants that a manifest would list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Precision, ...]] = []
        self.held: set[str] = set()
        self.errors: dict[Precision, str] = {}
        monkeypatch.setattr(sample_exports, "_export", self.export)
        monkeypatch.setattr(sample_exports, "_variants", lambda model: self.held)

    def export(self, checkpoint: Path, repository: Path, precisions: list) -> dict[Precision, str]:
        repository.mkdir(exist_ok=True)
        self.asked.append(tuple(precisions))
        for precision in precisions:
            if precision not in self.errors:
                self.held |= sample_exports._keys(precision)
        return {p: error for p, error in self.errors.items() if p in precisions}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return Exporter(monkeypatch)


def test_what_is_there_is_not_exported_again(exporter: Exporter, tmp_path: Path) -> None:
    done = sample_export("nllb-clip", PRECISIONS, repository=tmp_path)
    assert (done.model, done.errors) == (tmp_path / "nllb-clip", {})
    sample_export("nllb-clip", [Precision.INT8], repository=tmp_path)
    sample_export("nllb-clip", [Precision.BF16], repository=tmp_path)
    assert exporter.asked == [PRECISIONS, (Precision.BF16,)]


def test_what_cannot_be_exported_is_remembered(exporter: Exporter, tmp_path: Path) -> None:
    exporter.errors = {Precision.INT8: "it retrieves worse"}
    for _ in range(2):
        assert sample_export("capivara", PRECISIONS, repository=tmp_path).errors == exporter.errors
    assert len(exporter.asked) == 1


def test_another_checkpoint_is_exported_anew(
    exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tmp_path / "samples"
    shutil.copytree(CHECKPOINTS / "capivara-lora", samples / "mine")
    monkeypatch.setattr("bench.models.samples.CHECKPOINTS", samples)
    monkeypatch.setattr("bench.models.samples.SAMPLES", ("mine",))
    sample_export("mine", PRECISIONS, repository=tmp_path / "repository")
    with next((samples / "mine").glob("*.safetensors")).open("ab") as file:
        file.write(b"\0")
    sample_export("mine", PRECISIONS, repository=tmp_path / "repository")
    assert exporter.asked == [PRECISIONS, PRECISIONS]


def test_another_library_is_exported_anew(
    exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_export("altclip", PRECISIONS, repository=tmp_path)
    monkeypatch.setattr(sample_exports.metadata, "version", lambda package: "0")
    sample_export("altclip", PRECISIONS, repository=tmp_path)
    assert len(exporter.asked) == 2


def test_a_name_that_is_none_is_refused(exporter: Exporter, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"No sample checkpoint 'clip'.*nllb-clip"):
        sample_export("clip", PRECISIONS, repository=tmp_path)
    assert all((CHECKPOINTS / name).is_dir() for name in FAMILIES)
