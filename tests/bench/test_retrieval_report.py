"""From two embeddings of a small set to figures, verdict, record, table, searches and page; no torch."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re

import numpy as np
import pytest
from evaluations import N_IMAGES, evaluation, small_set
from PIL import Image
from rich.console import Console

from bench.accuracy.published_figures import (
    PUBLISHED,
    published_beside,
    published_by_language,
    published_figures,
)
from bench.accuracy.retrieval_report import SCHEMA, RetrievalReport
from bench.accuracy.searches import named_searches, sample_searches, turned_searches
from bench.datasets import CLASS_LAYOUTS, LAYOUTS, Captions, ImageBytes, RetrievalSet
from bench.records.environment import environment
from bench.reporting.retrieval_page import page_from_evaluation, write_page
from bench.reporting.retrieval_table import Order, print_report
from export.commands.progress import progress_bars
from export.retrieval.comparison import Direction, compare_retrieval
from export.retrieval.metrics import Relevance, RetrievalProtocol
from export.retrieval.vectors import TextIndex
from export.retrieval.verdict import RetrievalLimits
from runtime.errors import DatasetError


def printed(report: RetrievalReport, width: int, order: Order = Order.WORST) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_report(console, report, order)
    return console.file.getvalue()


def test_identical_texts_of_a_language_are_embedded_once():
    dataset = small_set()
    with_language = TextIndex.of(dataset, with_language=True)
    assert len(with_language.texts) == N_IMAGES + 20 + 2
    assert set(with_language.languages) == {"eng_Latn", "arb_Arab", "zho_Hans"}
    assert set(TextIndex.of(dataset, with_language=False).languages) == {None}
    for entry in dataset.captions:
        assert tuple(with_language.texts[i] for i in with_language.rows[entry.code]) == entry.texts


def test_a_text_without_language_is_shared_between_languages():
    images = (ImageBytes("a", b""),)
    captions = (Captions("en", "eng_Latn", ("taxi",), (0,)), Captions("de", "deu_Latn", ("taxi",), (0,)))
    dataset = RetrievalSet("shared", images, captions)
    assert TextIndex.of(dataset, with_language=False).texts == ("taxi",)
    assert TextIndex.of(dataset, with_language=True).texts == ("taxi", "taxi")


def test_equal_embeddings_pass():
    report = evaluation().report
    assert report.passed
    assert report.failures == ()
    assert report.n_turned == 0
    assert report.min_cosine == pytest.approx(1.0)
    assert report.n_decisions == 3 * (24 + 24 + 24 + 24 + 2 + 1)
    first, second = report.mean_recall_at(Direction.TEXT_TO_IMAGE, 1)
    assert first == second


def test_images_without_caption_are_candidates_but_no_queries():
    figures = next(f for f in evaluation().report.languages if f.code == "zhm")
    assert figures.text_to_image.reference.n_queries == 2
    assert figures.image_to_text.reference.n_queries == 1


def test_noise_fails_and_the_failures_say_where():
    report = evaluation(noise=0.5).report
    assert not report.passed
    assert report.n_turned > 0
    assert any(
        re.match(r"texts in en: cosine 0\.\d+ at row \d+; the limit is 0.999999", f) for f in report.failures
    )
    assert any("en, text_to_image: R@1" in f and "the limit is equal recall" in f for f in report.failures)


def test_noise_within_looser_limits_passes():
    assert evaluation(noise=0.02, limits=RetrievalLimits(0.9, 0.0, 0.2, 0.2, 0.2, 2e-6)).report.passed


@pytest.mark.parametrize(("first", "later", "named"), [(1.0, -1.0, {5, 10}), (-1.0, 1.0, {1})])
def test_recall_at_one_and_the_later_ones_have_limits_of_their_own(first, later, named):
    limits = RetrievalLimits(-1.0, -1.0, first, later, 1.0, 0.0)
    failures = evaluation(noise=0.02, limits=limits).report.failures
    assert failures
    assert {int(k) for failure in failures for k in re.findall(r"R@(\d+)", failure)} == named


@pytest.mark.parametrize(("gap", "passes"), [(1e-7, True), (1e-3, False)])
def test_a_turn_is_forgiven_only_where_pytorch_itself_is_undecided(gap, passes):
    items = np.array([[1, 0], [1 - gap, 0]], dtype=np.float32)
    swapped = items[::-1].copy()
    query = np.array([[1, 0]], dtype=np.float32)
    relevance = Relevance(np.array([0]), np.array([0]), 1, 2)
    comparison = compare_retrieval((query, query), (items, swapped), relevance, RetrievalProtocol.ANY)
    assert comparison.drop(1) == 1.0
    assert [hit.k for hit in comparison.turned] == [1]
    assert comparison.turned[0].reference_hits
    assert (comparison.drop_beyond_ties(1, 2e-6) == 0.0) is passes


def test_rows_come_worst_first():
    recalls = [f.text_to_image.exported.at[1] for f in evaluation(noise=0.5).report.worst_first()]
    assert recalls == sorted(recalls)


def test_the_record_is_json_with_every_field():
    report = evaluation(noise=0.5).report
    record = json.loads(report.to_json())
    names = {field.name for field in dataclasses.fields(report)}
    assert set(record) == {*names, "verdict"}
    assert record["schema"] == SCHEMA
    assert record["verdict"] == {"passed": False, "failures": list(report.failures)}
    assert record["model"]["fingerprint"] == "f" * 64
    assert (record["language_map"], record["protocol"]) == ("paper", "any")
    assert {"cpu", "instruction_sets", "n_cores", "versions", "commit", "python", "system"} == set(
        record["environment"]
    )
    english = record["languages"][0]
    assert set(english["text_to_image"]["reference"]["at"]) == {"1", "5", "10"}
    assert english["texts"]["cosine_min"] == report.languages[0].texts.cosine_min


def test_the_environment_names_processor_and_versions():
    found = environment()
    assert found.cpu
    assert found.n_cores >= 1
    assert "numpy" in found.versions


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_has_all_languages_and_fits(width):
    report = evaluation(noise=0.5).report
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    for part in ("en ", "ar ", "zhm ", "mean of 3", "FAIL", "language map 'paper'", "A note.", "tlh"):
        assert part in text


def test_the_table_can_be_ordered_by_code():
    lines = printed(evaluation(noise=0.5).report, 160, Order.CODE).splitlines()
    codes = [line.split()[0] for line in lines if line.split() and line.split()[0] in ("en", "ar", "zhm")]
    assert codes == ["en", "ar", "zhm"]


def test_progress_takes_stages_as_they_come():
    console = Console(file=io.StringIO())
    with progress_bars(console) as progress:
        progress("texts", 0, 3)
        progress("texts", 3, 3)
        progress("images", 1, 2)
    assert "texts" in console.file.getvalue()


def test_searches_mark_the_right_picture():
    done = evaluation()
    (search,) = named_searches(done, [("en", "picture 7"), ("tlh", "picture 7")])
    assert search.text == "<name> & 7"
    assert search.language == "eng_Latn"
    assert [answer.key for answer in search.exported if answer.is_right] == ["picture 7"]
    assert [answer.score for answer in search.exported] == sorted(
        (answer.score for answer in search.exported), reverse=True
    )
    assert search.agrees


def test_a_name_that_two_pictures_share_has_two_right_answers():
    done = evaluation()
    (search,) = named_searches(done, [("ar", "picture 21")])
    assert {answer.image for answer in search.exported if answer.is_right} <= {1, 21}


def test_a_picture_without_caption_cannot_be_asked_for():
    with pytest.raises(DatasetError, match="no caption of 'picture 7' in zhm"):
        named_searches(evaluation(), [("zhm", "picture 7")])


def test_sample_searches_cover_the_languages():
    assert {search.code for search in sample_searches(evaluation())} == {"en", "ar", "zhm"}


def test_turned_searches_give_both_ranks():
    for entry in turned_searches(evaluation(noise=0.5)):
        within = (entry.reference_rank <= entry.hit.k, entry.exported_rank <= entry.hit.k)
        assert within == (entry.hit.reference_hits, not entry.hit.reference_hits)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_page_is_self_contained(noise):
    done = evaluation(noise)
    page = page_from_evaluation(done, sample_searches(done))
    assert not re.search(r"""(?:src|href|url|@import|action)\s*[=(]\s*["']?(?:https?:)?//""", page)
    assert set(re.findall(r'src="(\w+):', page)) == {"data"}
    assert "<link" not in page
    assert page.count("<script>") == 1


@pytest.mark.parametrize(("noise", "verdict"), [(0.0, "<b>Pass</b>"), (0.5, "<b>Fail</b>")])
def test_the_page_says_the_verdict_and_every_language(noise, verdict):
    done = evaluation(noise)
    page = page_from_evaluation(done, sample_searches(done))
    assert verdict in page
    assert len(re.findall(r'<th scope="row" data-v=', page)) == 3
    assert page.count('<circle class="dot k1"') == 3 + 1  # and the legend's
    for part in ("Chinese (simplified characters)", "zhm", "Whose pictures these are.", "f" * 64, "tlh"):
        assert part in page
    assert ("number" in page) is (noise > 0)


def test_the_page_escapes_texts():
    done = evaluation()
    page = page_from_evaluation(done, named_searches(done, [("en", "picture 7")]))
    assert "&lt;name&gt; &amp; 7" in page
    assert "<name>" not in page


def test_large_pictures_become_thumbnails():
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    done = evaluation()
    images = (*done.dataset.images[:7], ImageBytes("picture 7", file.getvalue()), *done.dataset.images[8:])
    done = dataclasses.replace(done, dataset=dataclasses.replace(done.dataset, images=images))
    page = page_from_evaluation(done, named_searches(done, [("en", "picture 7")]))
    assert "data:image/jpeg;base64," in page
    assert len(page) < 120_000


def test_the_page_is_written(tmp_path):
    done = evaluation()
    write_page(tmp_path / "index.html", done, ())
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "Ask in any of them" not in text


@pytest.mark.parametrize(
    ("dataset", "architecture", "checkpoint", "line"),
    [
        (
            "crossmodal3600",
            "nllb-clip-large-siglip",
            "visheratin/nllb-clip-large-siglip",
            "published nllb-clip-large-siglip: text→image R@1 54.6, text→image R@5 79.1,",
        ),
        (
            "xtd10",
            "XLM-R 1024x24 + ViT 1024x24/14",
            "AltCLIP-m9",
            "published AltCLIP-m9: text→image R@1 48.0",
        ),
        (
            "flickr30k-cn",
            "XLM-R 1024x24 + ViT 1024x24/14",
            "BAAI/AltCLIP",
            "published AltCLIP: text→image R@1 69.8",
        ),
        (
            "capivara",
            "xlm-roberta-base-ViT-B-32",
            "my-folder",
            "published CAPIVARA, of the same architecture: text→image mean recall, pt 79.6",
        ),
    ],
)
def test_published_figures_stand_beside_with_their_source(dataset, architecture, checkpoint, line):
    done = evaluation()
    facts = dataclasses.replace(done.report.model, architecture=architecture, checkpoint=checkpoint)
    notes = ("Crossmodal-3600: the first caption of an image counts, as in CLIP_benchmark.",)
    report = dataclasses.replace(done.report, dataset=dataset, model=facts, notes=notes)
    assert line in " ".join(printed(report, 160).split())
    page = html.unescape(page_from_evaluation(dataclasses.replace(done, report=report), ()))
    found = published_figures(dataset, facts, notes)
    assert found
    assert all(str(entry) in page and "github.com/" in entry.source for entry in found)


def test_published_figures_stand_beside_each_language():
    done = evaluation()
    facts = dataclasses.replace(done.report.model, architecture="nllb-clip-base", checkpoint="my-folder")
    report = dataclasses.replace(done.report, dataset="xtd10", model=facts)
    text = printed(report, 120)
    (english,) = [row.split() for row in text.splitlines() if row.split()[:1] == ["en"]]
    assert english[-1] == "47.2"
    assert not any("…" in cell for cell in english)


@pytest.mark.parametrize(
    ("architecture", "checkpoint", "notes", "models"),
    [
        ("nllb-clip-base", "models/x", ("all captions of an image count",), {"nllb-clip-base"}),
        ("nllb-clip-base", "models/x", (), set()),
        ("nllb-clip-base-siglip", "nllb-siglip-mrl-base", ("first",), set()),
        (
            "m2m_100 64x2",
            "visheratin/nllb-clip-base-oc",
            ("all captions of an image count",),
            set(),
        ),
    ],
)
def test_published_figures_are_of_the_same_model_asked_alike(architecture, checkpoint, notes, models):
    facts = dataclasses.replace(evaluation().report.model, architecture=architecture, checkpoint=checkpoint)
    assert {entry.model for entry in published_figures("crossmodal3600", facts, notes)} == models


def test_one_of_two_models_of_an_architecture_is_never_guessed():
    facts = dataclasses.replace(
        evaluation().report.model, architecture="nllb-clip-base-siglip", checkpoint="my-folder"
    )
    found = published_figures("xtd10", facts)
    assert {entry.model for entry in found} == {"nllb-clip-base-siglip", "nllb-siglip-mrl-base"}
    assert published_beside(found, "text→image R@1") is None
    named = dataclasses.replace(facts, checkpoint="visheratin/nllb-siglip-mrl-base")
    found = published_figures("xtd10", named)
    assert {entry.model for entry in found} == {"nllb-siglip-mrl-base"}
    assert published_beside(found, "text→image R@1").of("de", "text→image R@1") == 67.6


def test_every_published_figure_names_a_layout_and_plausible_values():
    every = (*PUBLISHED, *published_by_language())
    assert {entry.dataset for entry in every} <= {*LAYOUTS, *CLASS_LAYOUTS}
    assert all(0 < value < 100 for entry in every for value in entry.values)
    assert all(len(row) == len(entry.measures) for entry in every for row in entry.by_language.values())


def test_mean_recall_is_the_mean_over_the_cut_offs():
    report = evaluation(noise=0.5).report
    exported = [report.mean_recall_at(Direction.IMAGE_TO_TEXT, k)[1] for k in (1, 5, 10)]
    assert report.mean_recall(Direction.IMAGE_TO_TEXT)[1] == pytest.approx(sum(exported) / 3)
