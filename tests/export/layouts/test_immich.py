"""immich's model folder: read by its service's contract, equal to the Encoder, in every precision."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from immich_exports import encoder_of, files, form_of, vectors_of_encoder, vectors_of_service, write_both
from immich_reader import Textual, Visual
from sample_models import CHECKPOINTS, NAMES
from small_exports import FEW
from typer.testing import CliRunner, Result

from export.checkpoint import towers_from_checkpoint
from export.layouts import immich
from export.layouts.layout import LayoutRequest, ModelPlace
from export.layouts.names import LayoutName
from export.layouts.publish import RECORD_FILE, layout_from_checkpoint, layout_from_towers
from export.layouts.registry import LAYOUTS
from export.parity.probes import one_token_words
from export.precision.calibration import CalibrationSize
from export.repository import ExportOptions
from export.towers import Towers
from export.vocabulary.selection import VocabularyOptions
from runtime.commands.app import app
from runtime.cosines import row_cosines
from runtime.errors import ExportError, ParityError
from runtime.local import LocalEncoder
from runtime.manifest import Precision

NAME_OF_SAMPLE = {
    "nllb-clip": "nllb-clip-base-siglip__v1",
    "nllb-siglip-mrl": "nllb-clip-base-siglip__mrl",
    "capivara": "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k",
    "capivara-lora": "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k",
    "altclip": "ViT-L-14__openai",
}
PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
SAME = 0.999999


@cache
def towers_of(sample: str) -> Towers:
    base = CHECKPOINTS / "capivara" if sample.endswith("-lora") else None
    return towers_from_checkpoint(CHECKPOINTS / sample, base=base)


@dataclass(frozen=True)
class Both:
    """One export in both forms: a folder for the service, and an encoder."""

    folder: Path
    encoder: LocalEncoder


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sample", NAMES)
def test_the_service_computes_the_vectors_of_the_encoder(
    sample: str, precision: Precision, tmp_path: Path
) -> None:
    name, size = NAME_OF_SAMPLE[sample], CalibrationSize()
    folder, model = write_both(towers_of(sample), tmp_path, name, precision, size)
    for found, wanted in zip(vectors_of_service(folder), vectors_of_encoder(model, precision), strict=True):
        assert found.shape == wanted.shape
        assert row_cosines(found, wanted).min() >= SAME


@pytest.mark.parametrize("sample", ["nllb-clip", "altclip"])
def test_a_pruned_vocabulary_gives_the_same_vectors(sample: str, tmp_path: Path) -> None:
    texts = {"eng_Latn": "a red apple", "por_Latn": "uma maçã vermelha", "spa_Latn": "una manzana roja"}
    towers, name = towers_of(sample), NAME_OF_SAMPLE[sample]
    vocabulary = VocabularyOptions(tuple(texts))
    options = dataclasses.replace(FEW, forms=(form_of(Precision.FP32),), vocabulary=vocabulary)
    done = layout_from_towers(towers, tmp_path, LayoutName.IMMICH, name=name, options=options)
    whole, _ = write_both(towers, tmp_path / "whole", name, Precision.FP32, CalibrationSize())
    (kept,) = done.record["vocabulary"]
    assert kept["n_tokens"] < towers.n_tokens == kept["n_whole"]
    sizes = [sum(f.stat().st_size for f in (place / "textual").iterdir()) for place in (done.folder, whole)]
    assert sizes[0] < sizes[1]
    pruned, full = Textual(done.folder), Textual(whole)
    for code, text in texts.items():
        found, wanted = (reader.predict_in(text, code) for reader in (pruned, full))
        assert row_cosines(found[None], wanted[None])[0] >= SAME


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    name, size = NAME_OF_SAMPLE["nllb-clip"], CalibrationSize()
    work = tmp_path_factory.mktemp("nllb")
    folder, model = write_both(towers_of("nllb-clip"), work, name, Precision.FP32, size)
    with encoder_of(model, Precision.FP32) as encoder:
        yield Both(folder, encoder)


@pytest.mark.parametrize(
    ("locale", "code"),
    [
        ("pt-BR", "por_Latn"),
        ("ja", "jpn_Jpan"),
        ("lv", "lvs_Latn"),
        ("zh-TW", "zho_Hant"),
        ("de-AT", "deu_Latn"),
        ("tlh", "eng_Latn"),
        (None, "eng_Latn"),
    ],
)
def test_a_locale_reaches_the_tokenizer(locale: str | None, code: str, nllb: Both) -> None:
    textual, text = Textual(nllb.folder), "tomate 1"
    vectors = {one: nllb.encoder.embed_texts([text], [one])[0] for one in (code, "eng_Latn", "ita_Latn")}
    found = textual.predict(text, locale)
    assert row_cosines(found[None], vectors[code][None])[0] >= SAME
    assert row_cosines(found[None], vectors["ita_Latn"][None])[0] < SAME


@pytest.mark.parametrize("n_words", [70, 73, 74, 75, 76, 77, 200])
def test_a_long_text_without_a_language_is_cut_as_with_the_default(n_words: int, nllb: Both) -> None:
    textual = Textual(nllb.folder)
    word = one_token_words(towers_of("nllb-clip").tokenizer_json)[0]
    text = " ".join([word] * n_words)
    found, wanted = textual.predict(text), nllb.encoder.embed_texts([text], ["eng_Latn"])
    assert row_cosines(found[None], wanted)[0] >= SAME


def test_a_graph_prepared_by_the_newer_service_computes_the_same(nllb: Both) -> None:
    plain, prepared = Textual(nllb.folder), Textual(nllb.folder, prepared=True)
    vectors = [reader.predict("uma maçã", "pt") for reader in (plain, prepared)]
    assert row_cosines(vectors[0][None], vectors[1][None])[0] >= SAME
    shown = [Visual(nllb.folder, prepared=way).predict(files()[0]) for way in (False, True)]
    assert row_cosines(shown[0][None], shown[1][None])[0] >= SAME


def test_the_context_holds_only_the_tokens_of_the_text(nllb: Both) -> None:
    """Tokens that a tower never sees cost nothing: positions behind the text are cut in the graph."""
    session = Textual(nllb.folder).session
    session_input = session.get_inputs()[0]
    assert (session_input.name, session_input.type) == ("text", "tensor(int32)")
    assert session_input.shape[1] == 77
    assert [output.name for output in session.get_outputs()] == ["vector"]


def small(**changes: object) -> ExportOptions:
    return dataclasses.replace(FEW, forms=(form_of(Precision.FP32),), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache_folder = tmp_path_factory.mktemp("published") / "cache"
    name = NAME_OF_SAMPLE["nllb-siglip-mrl"]
    layout_from_checkpoint(
        CHECKPOINTS / "nllb-siglip-mrl", cache_folder, LayoutName.IMMICH, name=name, options=small()
    )
    return cache_folder / "clip" / name


def test_the_gate_measures_what_the_service_computes(published: Path) -> None:
    record = json.loads((published / RECORD_FILE).read_text(encoding="utf-8"))
    parity = record["parity"]
    assert parity["token_ids_equal"]
    assert parity["other_texts"] == ["  Two  SPACES\tand\na line &amp; ﬁne “quotes” ½  "]
    (figures,) = parity["engines"].values()
    assert figures["text"]["min_cosine"] >= SAME
    assert len(figures["languages"]) > 200
    (retrieval,) = parity["retrieval"].values()
    assert len(retrieval["languages"]) > 100
    listed = {file["path"] for file in record["files"]}
    found = {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()}
    assert found == listed | {RECORD_FILE}


def test_nothing_lies_beside_a_published_model(published: Path) -> None:
    assert [path.name for path in published.parent.parent.iterdir()] == ["clip"]
    assert not list(published.parent.parent.parent.glob(".*"))


def test_a_taken_place_is_kept(published: Path) -> None:
    before = (published / RECORD_FILE).read_bytes()
    with pytest.raises(ExportError, match=r"exists already\. Pass --replace"):
        layout_from_towers(
            towers_of("nllb-siglip-mrl"),
            published.parent.parent,
            LayoutName.IMMICH,
            name=published.name,
            options=small(),
        )
    assert (published / RECORD_FILE).read_bytes() == before


def test_a_model_that_lost_a_language_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(immich, "CODES_OF_IMMICH", {})  # Japanese falls back on English
    name = NAME_OF_SAMPLE["nllb-clip"]
    with pytest.raises(ParityError, match="token ids differ"):
        layout_from_towers(towers_of("nllb-clip"), tmp_path, LayoutName.IMMICH, name=name, options=small())
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.fp32.refused.json"]


def place_of(towers: Towers, name: str | None) -> ModelPlace:
    return LAYOUTS[LayoutName.IMMICH].place(towers, name)


@pytest.mark.parametrize(
    ("sample", "name", "message"),
    [
        ("nllb-clip", None, r"no model of this architecture .*Pass --name .*nllb-clip-base-siglip__v1"),
        ("nllb-clip", "my-model", r"loads no model named 'my-model'"),
        ("nllb-clip", "ViT-L-14__openai", r"has language tokens, so 'ViT-L-14__openai' does not fit"),
        ("altclip", "nllb-clip-base-siglip__v1", r"has no language tokens, so .* does not fit"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(sample: str, name: str | None, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        place_of(towers_of(sample), name)


def test_a_width_that_the_database_does_not_expect_is_told() -> None:
    notes = place_of(towers_of("nllb-clip"), NAME_OF_SAMPLE["nllb-clip"]).notes
    assert any("expects 768-wide vectors" in note for note in notes)


@pytest.mark.parametrize(
    ("architecture", "mrl", "dim", "name"),
    [
        ("nllb-clip-base-siglip", False, 768, "nllb-clip-base-siglip__v1"),
        ("nllb-clip-large-siglip", False, 1152, "nllb-clip-large-siglip__v1"),
        ("xlm-roberta-base-ViT-B-32", False, 512, "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k"),
    ],
)
def test_a_published_checkpoint_has_its_name(architecture: str, mrl: bool, dim: int, name: str) -> None:
    sample = towers_of("capivara" if architecture.startswith("xlm") else "nllb-clip")
    towers = dataclasses.replace(sample, architecture=architecture, dim=dim)
    assert place_of(towers, None) == ModelPlace(name, Path("clip") / name, ())


def test_several_precisions_have_no_place() -> None:
    options = dataclasses.replace(FEW, forms=(form_of(Precision.FP32), form_of(Precision.INT8)))
    with pytest.raises(ExportError, match="of one precision"):
        layout_from_checkpoint(CHECKPOINTS / "capivara", "nowhere", LayoutName.IMMICH, options=options)


def test_an_oblong_image_tower_is_refused(tmp_path: Path) -> None:
    towers = towers_of("capivara")
    oblong = dataclasses.replace(
        towers, image_preprocessing=dataclasses.replace(towers.image_preprocessing, width=96)
    )
    place = place_of(oblong, NAME_OF_SAMPLE["capivara"])
    with pytest.raises(ExportError, match="resizes images to squares; this image tower takes 96×64"):
        LAYOUTS[LayoutName.IMMICH].write(LayoutRequest(oblong, {}, place, tmp_path))


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["export", *arguments, "--layout", "immich"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "openvino"], "immich runs graphs with onnxruntime; leave --engine out"),
        (["--precision", "fp32", "--precision", "int8"], "of one precision"),
        (["--precision", "bf16"], "bf16 is not supported on ['onnxruntime']"),
        (["--name", "mine"], "immich loads no model named 'mine'"),
        ([], "Pass --name with one that it knows"),
        (["--tensorrt-workspace", "64"], "TensorRT options apply to no variant"),
    ],
)
def test_the_command_says_what_does_not_fit(options: list[str], message: str, tmp_path: Path) -> None:
    done = command(str(CHECKPOINTS / "capivara"), str(tmp_path / "cache"), *options)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "cache").exists()


def test_the_command_publishes_and_prints_one_object(tmp_path: Path) -> None:
    name = NAME_OF_SAMPLE["capivara"]
    quick = ["--texts-per-language", "1", "--captions-per-language", "8", "--threads", "1", "--json"]
    done = command(str(CHECKPOINTS / "capivara"), str(tmp_path), "--name", name, *quick)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["model"] == str(tmp_path / "clip" / name)
    assert (record["layout"], record["precision"]) == ("immich", "fp32")
    assert Textual(tmp_path / "clip" / name).predict("um gato", "pt-BR").shape == (record["dim"],)
