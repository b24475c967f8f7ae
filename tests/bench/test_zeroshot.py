"""Zero-shot classification of an exported model beside PyTorch's: figures, verdict, table, record."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sample_models import CHECKPOINTS, ROOT, Exported
from typer.testing import CliRunner

from bench.accuracy.classification import classify
from bench.accuracy.classification_report import ClassificationReport
from bench.accuracy.evaluation import EvaluationSettings
from bench.datasets import read_classes
from bench.datasets.class_sets import ClassificationSet, ClassNames, Prompts
from bench.reporting.classification_table import print_classification
from bench.zeroshot import app
from export.retrieval.metrics import KS
from runtime import Encoder
from runtime.errors import LanguageError, ManifestError
from runtime.zeroshot import Classifier

LANGUAGES = ["eng_Latn", "por_Latn", "tha_Thai"]


@pytest.fixture(scope="module")
def drawings() -> ClassificationSet:
    """150 drawings, each a class, in three languages with templates."""
    whole = read_classes("emoji").select(LANGUAGES)
    n = 150
    languages = tuple(
        ClassNames(names.code, names.language, kept, tuple(of[c] for c in kept), names.templates)
        for names in whole.languages
        for of in [dict(zip(names.classes, names.labels, strict=True))]
        for kept in [tuple(sorted(c for c in of if c < n))]
    )
    return dataclasses.replace(
        whole, images=whole.images[:n], class_of=whole.class_of[:n], languages=languages
    )


@pytest.fixture(scope="module")
def report(drawings: ClassificationSet, exported: Exported) -> ClassificationReport:
    asked = drawings.asked_by(Prompts.TEMPLATES)
    return classify(CHECKPOINTS / "nllb-clip", exported("nllb-clip"), asked, EvaluationSettings())


def test_the_exported_model_classifies_as_pytorch(report: ClassificationReport) -> None:
    assert report.passed, report.failures
    assert report.min_cosine > 0.999999
    assert report.n_decisions == len(KS) * sum(f.n_images for f in report.languages)
    for figures in report.languages:
        found = figures.classification
        assert found.reference.at[1] > 5 / figures.n_classes  # far above chance
        assert found.reference.at[1] <= found.reference.at[5] <= found.reference.at[10]
        assert figures.n_templates > 1


def test_it_measures_what_the_classifier_serves(
    report: ClassificationReport, drawings: ClassificationSet, exported: Exported
) -> None:
    names = drawings.select(["por_Latn"]).languages[0]
    rows = drawings.rows(names)
    with Encoder.open(exported("nllb-clip"), threads=1) as encoder:
        classifier = Classifier.from_labels(encoder, names.labels, language="por_Latn")
        found = classifier.classify([drawings.images[row].read() for row in rows], k=5)
    label_of = dict(zip(names.classes, names.labels, strict=True))
    wanted = [label_of[drawings.class_of[row]] for row in rows]
    (figures,) = [f for f in report.languages if f.code == "por_Latn"]
    for k in (1, 5):
        hits = [w in [p.label for p in best[:k]] for w, best in zip(wanted, found, strict=True)]
        assert figures.classification.exported.at[k] == pytest.approx(np.mean(hits))


def test_the_record_repeats_the_run(report: ClassificationReport) -> None:
    record = json.loads(report.to_json())
    assert record["schema"] == "babeltower-zeroshot/1"
    assert record["prompts"] == "templates"
    assert record["verdict"] == {"passed": True, "failures": []}
    assert {row["code"] for row in record["languages"]} == set(LANGUAGES)
    assert record["model"]["checkpoint"] == "nllb-clip"


def printed(report: ClassificationReport, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_classification(console, report)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_has_all_languages_and_fits(width: int, report: ClassificationReport) -> None:
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    for part in (*LANGUAGES, "top-1", "top-5", "chance", "mean of 3", "PASS", "in every template"):
        assert part in " ".join(text.split()), part


def test_published_accuracy_stands_beside(report: ClassificationReport) -> None:
    facts = dataclasses.replace(report.model, architecture="nllb-clip-base", checkpoint="nllb-clip-base-oc")
    languages = tuple(
        dataclasses.replace(figures, code=code)
        for figures, code in zip(report.languages, ("EN", "PT", "TH"), strict=True)
    )
    babel = dataclasses.replace(report, dataset="babel-imagenet", model=facts, languages=languages)
    text = printed(babel, 80)
    (english,) = [row.split() for row in text.splitlines() if row.split()[:1] == ["EN"]]
    assert english[-1] == "24.3"
    assert max(map(len, text.splitlines())) <= 80
    assert "published nllb-clip-base: top-1, templates 24.7, mean of 90 languages" in " ".join(text.split())
    assert "published" not in printed(report, 80)


def test_lost_hits_are_found_and_named(report: ClassificationReport) -> None:
    worst = report.languages[0]
    lost = dataclasses.replace(worst.classification.exported, at=dict.fromkeys(KS, 0.0))
    broken = dataclasses.replace(
        worst, classification=dataclasses.replace(worst.classification, exported=lost)
    )
    failed = dataclasses.replace(report, languages=(broken, *report.languages[1:]))
    assert not failed.passed
    assert any(f.startswith(f"{worst.code}, classification: R@1") for f in failed.failures)
    assert "FAIL" in printed(failed, 120)


def test_languages_without_a_token_are_left_out_or_refused(
    drawings: ClassificationSet, exported: Exported
) -> None:
    lojban = ClassNames("JBO", None, (0, 1), ("cipra", "mlatu"))
    few = dataclasses.replace(drawings.select(["eng_Latn"]), images=drawings.images[:3], class_of=(0, 1, 2))
    both = dataclasses.replace(few, languages=(*few.languages, lojban)).asked_by(Prompts.LABELS)
    found = classify(CHECKPOINTS / "nllb-clip", exported("nllb-clip"), both, EvaluationSettings())
    assert (found.unspoken, [f.code for f in found.languages]) == (("JBO",), ["eng_Latn"])
    with pytest.raises(LanguageError, match="JBO"):
        classify(CHECKPOINTS / "nllb-clip", exported("nllb-clip"), both.select(["JBO"]), EvaluationSettings())
    spoken = classify(CHECKPOINTS / "capivara", exported("capivara"), both, EvaluationSettings())
    assert [f.name for f in spoken.languages] == ["English", "JBO"]  # XLM-R takes no language


def test_another_checkpoint_is_refused(drawings: ClassificationSet, exported: Exported) -> None:
    asked = drawings.asked_by(Prompts.LABELS)
    with pytest.raises(ManifestError, match="exported from another checkpoint"):
        classify(CHECKPOINTS / "altclip", exported("capivara"), asked, EvaluationSettings())


def test_the_command_reads_a_folder_and_writes_a_record(
    exported: Exported, drawings: ClassificationSet, tmp_path: Path
) -> None:
    labels = {}
    for index in range(4):
        folder = tmp_path / "data" / "images" / f"class{index}"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(drawings.images[index].read())
        labels[folder.name] = drawings.languages[0].labels[index]
    (tmp_path / "data" / "labels").mkdir()
    (tmp_path / "data" / "labels" / "en.json").write_text(json.dumps({"labels": labels}))
    options = {
        "--checkpoint": CHECKPOINTS / "capivara",
        "--model": exported("capivara"),
        "--dataset": "image-folder",
        "--data": tmp_path / "data",
        "--json": tmp_path / "record" / "z.json",
    }
    result = CliRunner().invoke(app, [str(word) for pair in options.items() for word in pair])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "record" / "z.json").read_text(encoding="utf-8"))
    assert (record["dataset"], record["languages"][0]["n_classes"]) == ("image-folder", 4)


@pytest.mark.parametrize("command", [["bench/zeroshot.py"], ["-m", "bench.zeroshot"]])
def test_it_runs_as_a_script_and_as_a_module(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "160", "TERM": "dumb", "HF_HUB_OFFLINE": "1"},
    )
    assert "--dataset" in done.stdout


def test_a_model_without_its_checkpoint_is_refused() -> None:
    result = CliRunner().invoke(app, ["--checkpoint", "somewhere"])
    assert result.exit_code == 2
