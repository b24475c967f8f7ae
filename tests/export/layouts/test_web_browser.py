"""Pages of ``--layout web`` in Chromium: the Encoder's vectors and answers, and everything they must tell."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from immich_exports import encoder_of
from sample_models import NAMES
from vector_folders import write_shard
from web_pages import (
    ask,
    captions_of,
    change_site,
    needs_chromium,
    opened_page,
    replace_asset,
    towers_of,
    wait_until_ready,
    write_page,
)

from bench.timing.web_page import figures_of_page, opened_chromium
from export.layouts.web.assets import write_joined
from export.layouts.web.gallery import GallerySource
from export.layouts.web.probes import LEAST_COSINE, MEAN_COSINE
from runtime.cosines import row_cosines
from runtime.manifest import Precision
from samples.dataset import load_gallery

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = needs_chromium

LANGUAGES = ("por_Latn", "eng_Latn", "jpn_Jpan", "arb_Arab", "hin_Deva", "rus_Cyrl")
KEPT = ",".join(LANGUAGES)
A_LANGUAGE = 30


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_chromium() as found:
        yield found


@dataclass(frozen=True)
class Exported:
    """One draft as a page and as a repository."""

    page: Path
    model: Path

    @property
    def site(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.page / "site.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """NLLB-CLIP with six languages, in a folder whose name needs escaping."""
    work = tmp_path_factory.mktemp("a page #1 ü%")
    return Exported(*write_page(towers_of("nllb-clip", KEPT), work))


@pytest.fixture
def copied(pruned: Exported, tmp_path: Path) -> Path:
    """A copy of the page, to be damaged."""
    return Path(shutil.copytree(pruned.page, tmp_path / "site"))


def captions() -> list[tuple[str, str]]:
    return [(text, code) for code in LANGUAGES for text in captions_of(code)[:: 1_500 // A_LANGUAGE]]


def require_same_as_encoder(exported: Exported, precision: Precision, browser: Browser) -> None:
    rows = captions()
    with encoder_of(exported.model, precision) as encoder, opened_page(browser, exported.page) as page:
        wait_until_ready(page)
        found = ask(page, rows)
        wanted = np.concatenate([encoder.embed_texts([text], [code]) for text, code in rows])
        drawings = np.concatenate(
            [
                encoder.embed_images([drawing.png for drawing in load_gallery()[i : i + 64]])
                for i in range(0, 1_911, 64)
            ]
        )
    vectors = np.array([answer["vector"] for answer in found], np.float32)
    cosines = row_cosines(vectors, wanted)
    assert cosines.mean() >= MEAN_COSINE
    assert (cosines >= 0.999).mean() >= 0.98
    assert cosines.min() >= LEAST_COSINE
    scores = wanted @ drawings.T
    differences = []
    for answer, row in zip(found, scores, strict=True):
        shown = [hit["row"] for hit in answer["hits"]]
        assert len(shown) == len(set(shown)) == 24
        differences.append(np.abs(np.array([hit["score"] for hit in answer["hits"]]) - row[shown]))
    # vectors of the gallery are rounded to float16; in most texts, no activation is rounded otherwise
    assert np.median(differences) < 1e-3
    assert np.max(differences) < 0.1
    assert all(answer["notes"] == [] for answer in found)


@pytest.mark.parametrize("sample", [name for name in NAMES if name != "nllb-clip"])
def test_a_page_answers_as_the_encoder(sample: str, browser: Browser, tmp_path: Path) -> None:
    exported = Exported(*write_page(towers_of(sample), tmp_path))
    require_same_as_encoder(exported, Precision.INT8, browser)


def test_a_page_of_a_part_of_the_vocabulary_answers_as_the_encoder(
    pruned: Exported, browser: Browser
) -> None:
    require_same_as_encoder(pruned, Precision.INT8, browser)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_other_precisions_answer_as_the_encoder(
    precision: Precision, browser: Browser, tmp_path: Path
) -> None:
    exported = Exported(*write_page(towers_of("capivara", KEPT), tmp_path, precision=precision))
    require_same_as_encoder(exported, precision, browser)


TOKENS = """
async (rows) => {
  const { loadSite, loadAssets } = await import(new URL("assets.js", document.baseURI));
  const { TextReader } = await import(new URL("text.js", document.baseURI));
  const site = await loadSite(new URL("site.json", document.baseURI));
  const base = new URL("./", document.baseURI);
  const { tokenizer } = await loadAssets({ tokenizer: site.assets.tokenizer }, base);
  const reader = new TextReader(site.text, JSON.parse(new TextDecoder().decode(tokenizer)));
  return rows.map(([text, language]) => reader.read(text, language).ids);
}
"""


def test_all_captions_have_the_tokens_of_the_encoder(pruned: Exported, browser: Browser) -> None:
    from runtime.preprocessing.text import Text

    rows = [(text, code) for code in LANGUAGES for text in captions_of(code)]
    assert len(rows) > 11_000
    with encoder_of(pruned.model, Precision.INT8) as encoder:
        texts = [Text(text, i, code) for i, (text, code) in enumerate(rows)]
        wanted = [row.ids for row in encoder.token_rows(texts)]
    with opened_page(browser, pruned.page) as page:
        wait_until_ready(page)
        assert page.evaluate(TOKENS, rows) == wanted


def test_threads_are_used_where_the_host_isolates_the_page(pruned: Exported, browser: Browser) -> None:
    rows = [("um gato preto", "por_Latn"), ("寿司", "jpn_Jpan")]
    isolating = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
    found = []
    for headers in ({}, isolating):
        with opened_page(browser, pruned.page, headers=headers) as page:
            wait_until_ready(page)
            cores = page.evaluate("navigator.hardwareConcurrency")
            assert page.evaluate("crossOriginIsolated") is bool(headers)
            assert page.get_attribute("body", "data-threads") == (str(min(4, cores)) if headers else "1")
            found.append(np.array([answer["vector"] for answer in ask(page, rows)]))
    assert row_cosines(found[0], found[1]).min() >= LEAST_COSINE


def test_a_page_is_measured(pruned: Exported, browser: Browser) -> None:
    figures = figures_of_page(browser, pruned.page, ["gato", "casa", "sol"])
    needed = sum(a["bytes"] for name, a in pruned.site["assets"].items() if name != "whole_tokenizer")
    assert needed < figures.fetched_bytes < needed + 600_000
    assert figures.lowest_cosine >= LEAST_COSINE
    assert all(value > 0 for value in dataclasses.asdict(figures).values())


# --- nothing silent


def failure_of(browser: Browser, folder: Path, **options: str) -> str:
    with opened_page(browser, folder, **options) as page:
        page.wait_for_selector("#failure:not([hidden])")
        assert not page.is_visible("#ask")
        assert not page.is_visible("#loading")
        return page.inner_text("#failure-text")


ASSETS = ("graph", "weights", "tokenizer", "probes", "probe_vectors", "items", "vectors", "wasm")


def path_of(folder: Path, asset: str) -> Path:
    site = json.loads((folder / "site.json").read_text(encoding="utf-8"))
    return folder / str(site["assets"][asset]["parts"][0]["path"])


@pytest.mark.parametrize("asset", ASSETS)
def test_a_missing_file_is_told(asset: str, copied: Path, browser: Browser) -> None:
    path = path_of(copied, asset)
    path.unlink()
    assert f"{path.name} is missing on the host (HTTP 404)" in failure_of(browser, copied)


@pytest.mark.parametrize(
    "name",
    [
        "app.js",
        "engine.js",
        "text.js",
        "character_map.js",
        "vendor/tokenizers/tokenizers.min.js",
        "vendor/onnxruntime-web/ort.wasm.min.js",
        "vendor/onnxruntime-web/ort-wasm-simd-threaded.js",
        "site.json",
    ],
)
def test_a_missing_module_is_told(name: str, copied: Path, browser: Browser) -> None:
    (copied / name).unlink()
    message = failure_of(browser, copied)
    assert "opy the whole folder to the host again" in message
    assert "missing" in message or "could not be opened" in message


@pytest.mark.parametrize("name", ["app.js", "engine.js", "text.js", "site.json"])
def test_a_module_that_was_cut_is_told(name: str, copied: Path, browser: Browser) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[: len(data) // 2])
    assert "opy the whole folder to the host again" in failure_of(browser, copied)


@pytest.mark.parametrize("asset", ASSETS)
def test_a_changed_file_is_told(asset: str, copied: Path, browser: Browser) -> None:
    path = path_of(copied, asset)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{path.name} differs from the file that was exported" in failure_of(browser, copied)


@pytest.mark.parametrize(("change", "how"), [(-7, "shorter"), (7, "longer")])
def test_a_file_of_another_length_is_told(change: int, how: str, copied: Path, browser: Browser) -> None:
    path = path_of(copied, "weights")
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    assert f"is {how} than the file that was exported" in failure_of(browser, copied)


def test_a_model_that_answers_otherwise_here_is_refused(
    copied: Path, browser: Browser, tmp_path: Path
) -> None:
    site = json.loads((copied / "site.json").read_text(encoding="utf-8"))
    write_joined(copied, site["assets"]["probe_vectors"], tmp_path / "vectors")
    vectors = np.frombuffer((tmp_path / "vectors").read_bytes(), "<f4").reshape(-1, site["dim"]).copy()
    vectors[3] += (
        0.3 * np.linalg.norm(vectors[3]) * np.sign(np.sin(np.arange(site["dim"]))) / site["dim"] ** 0.5
    )
    replace_asset(copied, "probe_vectors", vectors.tobytes())
    message = failure_of(browser, copied)
    assert "The model does not answer here as where it was exported" in message
    assert "cosine of 0.9" in message


def test_a_model_that_answers_a_little_otherwise_everywhere_is_refused(
    copied: Path, browser: Browser, tmp_path: Path
) -> None:
    site = json.loads((copied / "site.json").read_text(encoding="utf-8"))
    write_joined(copied, site["assets"]["probe_vectors"], tmp_path / "vectors")
    vectors = np.frombuffer((tmp_path / "vectors").read_bytes(), "<f4").reshape(-1, site["dim"])
    noise = np.random.default_rng(0).standard_normal(vectors.shape)
    moved = vectors + 0.07 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    replace_asset(copied, "probe_vectors", moved.astype("<f4").tobytes())
    assert "mean cosine of 0.99" in failure_of(browser, copied)


def test_other_tokens_are_refused(copied: Path, browser: Browser, tmp_path: Path) -> None:
    site = json.loads((copied / "site.json").read_text(encoding="utf-8"))
    write_joined(copied, site["assets"]["probes"], tmp_path / "probes")
    probes = json.loads((tmp_path / "probes").read_text(encoding="utf-8"))
    probes[2]["ids"][1] += 1
    replace_asset(copied, "probes", json.dumps(probes).encode())
    assert "splits 1 of" in failure_of(browser, copied)


@pytest.mark.parametrize(
    ("prepare", "missing"),
    [
        ("WebAssembly.validate = () => false", "WebAssembly SIMD"),
        ("delete window.WebAssembly", "WebAssembly"),
        ("delete Intl.Segmenter", "Intl.Segmenter"),
        ("delete window.DecompressionStream", "DecompressionStream"),
    ],
)
def test_a_browser_that_cannot_is_told(
    prepare: str, missing: str, pruned: Exported, browser: Browser
) -> None:
    assert f"This browser lacks {missing}." in failure_of(browser, pruned.page, prepare=prepare)


def test_a_page_that_is_opened_as_a_file_says_how_to_serve_it(pruned: Exported, browser: Browser) -> None:
    page = browser.new_page()
    try:
        page.goto((pruned.page / "index.html").as_uri())
        page.wait_for_selector("#failure:not([hidden])")
        assert "python -m http.server" in page.inner_text("#failure-text")
    finally:
        page.close()


def test_a_page_of_another_format_is_refused(copied: Path, browser: Browser) -> None:
    change_site(copied, lambda site: site.update(format="babeltower-web/9"))
    assert "site.json has format babeltower-web/9" in failure_of(browser, copied)


def test_a_text_that_needs_dropped_tokens_is_told(pruned: Exported, browser: Browser) -> None:
    rows = [("안녕하세요 사과", "eng_Latn"), ("um gato preto", "por_Latn"), ("ελληνικά", "eng_Latn")]
    with encoder_of(pruned.model, Precision.INT8) as encoder:
        dropped = encoder.dropped_tokens([text for text, _ in rows])
    assert [bool(tokens) for tokens in dropped] == [True, False, True]
    with opened_page(browser, pruned.page) as page:
        wait_until_ready(page)
        found = ask(page, rows)
    for tokens, answer in zip(dropped, found, strict=True):
        notes = " ".join(answer["notes"])
        assert ("keeps the vocabulary of some languages only" in notes) is bool(tokens)
        for token in tokens[:3]:
            assert token.replace("▁", " ").strip() in notes


def test_dropped_tokens_that_cannot_be_looked_up_are_told(copied: Path, browser: Browser) -> None:
    path_of(copied, "whole_tokenizer").unlink()
    with opened_page(browser, copied) as page:
        wait_until_ready(page)
        (answer,) = ask(page, [("안녕하세요", "eng_Latn")])
        assert "this could not be checked" in answer["notes"][0]
        assert page.locator("#results li").count() == 24


def test_texts_that_are_cut_refused_or_not_cleaned_are_told(pruned: Exported, browser: Browser) -> None:
    longest = pruned.site["text"]["longest"]
    rows = [
        ("cat " * 100, "eng_Latn"),
        ("x" * (longest + 1), "eng_Latn"),
        ("fish &amp; chips", "eng_Latn"),
        ("cafÃ© au lait", "eng_Latn"),
    ]
    with opened_page(browser, pruned.page) as page:
        wait_until_ready(page)
        notes = [" ".join(answer["notes"]) for answer in ask(page, rows)]
    assert "its first 75 of 100 tokens were used" in notes[0] or "tokens were used" in notes[0]
    assert f"Shorten it to {longest:,} characters" in notes[1]
    assert "HTML codes" in notes[2]
    assert "decoded wrongly" in notes[3]


def test_half_a_character_is_refused(pruned: Exported, browser: Browser) -> None:
    with opened_page(browser, pruned.page) as page:
        wait_until_ready(page)
        page.evaluate("document.getElementById('text').value = 'a\\ud83d'")
        page.click("#go")
        page.wait_for_selector("body[data-settled='1']")
        assert "half a character" in page.inner_text("#notes")


def test_an_empty_text_is_told(pruned: Exported, browser: Browser) -> None:
    with opened_page(browser, pruned.page) as page:
        wait_until_ready(page)
        page.fill("#text", "   ")
        page.click("#go")
        assert "Type what you are looking for." in page.inner_text("#notes")


# --- use


def test_a_path_with_odd_characters_and_an_address_with_a_query(pruned: Exported, browser: Browser) -> None:
    """Served from a folder above, whose name has spaces, a hash and a percent sign."""
    from urllib.parse import quote

    above = pruned.page.parents[2]
    path = "/" + quote(pruned.page.relative_to(above).as_posix()) + "/index.html?from=link"
    with opened_page(browser, above, path=path, fragment="#q=abacaxi&l=por_Latn") as page:
        wait_until_ready(page)
        page.wait_for_selector("body[data-settled='1']")
        assert page.input_value("#text") == "abacaxi"
        assert page.input_value("#language") == "por_Latn"
        assert page.locator("#results li").count() == 24
        page.fill("#text", "sol & lua")
        page.click("#go")
        page.wait_for_selector("body[data-settled='2']")
        assert page.url.endswith("#q=sol+%26+lua&l=por_Latn")


def test_the_page_is_used_by_keyboard(pruned: Exported, browser: Browser) -> None:
    with opened_page(browser, pruned.page) as page:
        wait_until_ready(page)
        assert page.evaluate("document.activeElement.id") == "text"
        page.keyboard.type("cat")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-settled='1']")
        reached = []
        for _ in range(8):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        examples = page.locator("#examples button").all_inner_texts()
        assert reached[: 2 + len(examples)] == ["go", *examples, "more"]
        page.focus("#more")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-settled='2']")
        assert page.locator("#results li").count() == 48
        assert page.inner_text("#status").startswith("48 of 1,911")


def test_the_chooser_has_the_kept_languages_in_their_own_names(pruned: Exported, browser: Browser) -> None:
    with opened_page(browser, pruned.page) as page:
        wait_until_ready(page)
        options = page.locator("#language option").all_inner_texts()
        assert len(options) == len(LANGUAGES)
        assert any("日本語" in option for option in options)
        assert page.input_value("#language") == "eng_Latn"
        page.select_option("#language", "arb_Arab")
        assert page.get_attribute("#text", "lang") == "ar"


@pytest.mark.parametrize("width", [320, 700, 1_280])
def test_nothing_is_wider_than_the_screen(width: int, pruned: Exported, browser: Browser) -> None:
    with opened_page(browser, pruned.page) as page:
        page.set_viewport_size({"width": width, "height": 600})
        wait_until_ready(page)
        ask(page, [("a long " + "word" * 40, "eng_Latn"), ("cat", "eng_Latn")])
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_dark_page_has_light_letters(pruned: Exported, browser: Browser) -> None:
    with opened_page(browser, pruned.page) as page:
        wait_until_ready(page)
        grounds = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds == ["rgb(251, 250, 248)", "rgb(22, 21, 20)"]


def test_names_are_shown_as_they_are(browser: Browser, tmp_path: Path) -> None:
    """Names of a gallery come from anywhere: none is markup, and none reaches outside the page."""
    towers = towers_of("capivara", "por,eng")
    names = [
        '<img src=x onerror="document.title=1">',
        "<script>document.title=2</script>",
        "a&amp;b",
        "x" * 500,
        "שלום",
    ]
    vectors = np.eye(len(names), towers.dim, dtype=np.float32)
    write_shard(
        tmp_path / "part-00000.parquet",
        names,
        vectors,
        fingerprint=towers.fingerprint,
        modality="image",
        source="",
    )
    page_folder, _ = write_page(towers, tmp_path, gallery=GallerySource(tmp_path / "part-00000.parquet"))
    with opened_page(browser, page_folder) as page:
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        wait_until_ready(page)
        ask(page, [('<b onclick="alert(1)">', "eng_Latn")])
        assert sorted(page.locator("#results .name").all_inner_texts()) == sorted(names)
        assert page.locator("#results img, #results script, #notes b").count() == 0
        assert page.title() == "5 images – search"
        assert not page.is_visible("#more")
        assert not page.is_visible("#language-field")


def test_a_missing_picture_is_told_in_its_place(copied: Path, browser: Browser) -> None:
    shutil.rmtree(copied / "gallery" / "pictures")
    with opened_page(browser, copied) as page:
        wait_until_ready(page)
        ask(page, [("cat", "eng_Latn")])
        page.wait_for_selector("#results li >> text=picture missing on the host")
