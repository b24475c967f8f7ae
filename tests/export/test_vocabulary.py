"""Pruned vocabularies: equal vectors for what needs no dropped token, and a count of what does."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from precision_models import Batch, batches_of, graph_of, vectors
from sample_models import CHECKPOINTS, Exported
from small_exports import FEW, QUICK
from tokenizers import Tokenizer as Subwords
from tokenizers.models import BPE, Unigram
from typer.testing import CliRunner

from babeltower import Encoder
from export import repository_from_checkpoint
from export.checkpoint import towers_from_checkpoint
from export.graphs.token_rows import keep_token_rows
from export.precision.calibration import CalibrationSet, samples_folder
from export.precision.graph_request import GraphRequest
from export.repository import ExportOptions
from export.retrieval.sample_set import sample_retrieval_set
from export.variants import FORMS, Form
from export.vocabulary.characters import characters_of_languages, is_written_in
from export.vocabulary.pruned_towers import PrunedReference, pruned_towers
from export.vocabulary.selection import VocabularyOptions, languages_from_list
from export.vocabulary.subwords import Subvocabulary
from runtime.commands.app import app
from runtime.errors import (
    BabeltowerError,
    DatasetError,
    ExportError,
    InputError,
    LanguageError,
    ManifestError,
    ParityError,
)
from runtime.fingerprints import same_space
from runtime.indexes.exact import Index
from runtime.local import LocalEncoder
from runtime.manifest import WHOLE_TOKENIZER_FILE, Engine, KeptBy, Manifest, Modality
from runtime.preprocessing.text import Tokenizer, texts_with_languages

FAMILIES = ("nllb-clip", "capivara", "altclip")
LANGUAGES = ("eng_Latn", "por_Latn", "spa_Latn")
KEPT = VocabularyOptions(("por", "en-GB", "spa_Latn"))
OTHER_SCRIPT = "ein Straßenschild, שלום, 你好世界, Пример"

Pruned = Callable[[str], Path]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Sample name → REPOSITORY/NAME, exported in FP32 for three languages at its first use."""
    repository = tmp_path_factory.mktemp("pruned") / "repository"
    options = dataclasses.replace(QUICK, vocabulary=KEPT)

    def model_of(name: str) -> Path:
        if not (repository / f"{name}.babeltower.json").is_file():
            repository_from_checkpoint(CHECKPOINTS / name, repository, name=name, options=options)
        return repository / name

    return model_of


@pytest.fixture(scope="module")
def captions() -> dict[str, list[str]]:
    """All captions of the samples, by language."""
    return {entry.language: list(dict.fromkeys(entry.texts)) for entry in sample_retrieval_set().captions}


def whole_ids(encoder: LocalEncoder, texts: Sequence[str], language: str) -> list[list[int]]:
    return [row.ids for row in encoder.token_rows(list(texts_with_languages(texts, language)))]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_caption_of_the_kept_languages_has_the_vector_of_the_whole_model(
    family: str, exported: Exported, pruned: Pruned, captions: dict[str, list[str]]
) -> None:
    with Encoder.open(exported(family)) as whole, Encoder.open(pruned(family)) as part:
        assert isinstance(part, LocalEncoder)
        for language in LANGUAGES:
            texts = captions[language]
            assert len(texts) > 1000
            assert not any(part.dropped_tokens(texts))
            np.testing.assert_array_equal(
                part.embed_texts(texts, language), whole.embed_texts(texts, language)
            )
        assert set(LANGUAGES) == set(part.manifest.languages)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_smaller_and_says_what_was_kept(
    family: str, exported: Exported, pruned: Pruned
) -> None:
    before, after = Manifest.read(exported(family)), Manifest.read(pruned(family))
    (kept,) = after.vocabulary
    assert kept.languages == after.languages == after.text.kept_languages
    assert kept.kept_by is KeptBy.CHARACTERS
    assert kept.n_tokens < 0.6 * kept.n_whole
    assert kept.whole_fingerprint == before.fingerprint
    assert before.vocabulary == before.text.kept_languages == ()
    (tables,) = {len(table) for table in tables_of(graph_of(pruned(family), Modality.TEXT))}
    assert tables == kept.n_tokens
    assert after.text.pad_id == before.text.pad_id
    assert set(after.text.language_ids) == (set(LANGUAGES) if before.text.language_ids else set())
    parity = after.variants["fp32"].parity["engines"]
    assert {language for found in parity.values() for language in found["languages"]} == set(LANGUAGES)
    files = {Path(record.path).name for record in after.variants["fp32"].text.files}
    assert WHOLE_TOKENIZER_FILE in files


def tables_of(graph: Path) -> list[NDArray[Any]]:
    model = onnx_ir.load(graph)
    ids = model.graph.inputs[0]
    gathers = [use.node for use in ids.uses() if use.node.op_type == "Gather"]
    found = [node.inputs[0].const_value for node in gathers if node.inputs[0] is not None]
    assert found
    return [value.numpy() for value in found if value is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_needs_a_dropped_token_is_told_and_still_embedded(
    family: str, exported: Exported, pruned: Pruned
) -> None:
    texts = [
        "a red apple",
        OTHER_SCRIPT,
        "",
        "naïve café – 12 €",
        "<mask> eng_Latn deu_Latn",
        "\u1c5f\u1c60 ߒߞߏ",
    ]
    with Encoder.open(exported(family)) as whole, Encoder.open(pruned(family)) as part:
        assert isinstance(part, LocalEncoder)
        assert isinstance(whole, LocalEncoder)
        dropped = part.dropped_tokens(texts)
        assert dropped[0] == dropped[2] == dropped[3] == ()
        assert dropped[1]
        vectors = part.embed_texts(texts, "eng_Latn")
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        equal = (vectors == whole.embed_texts(texts, "eng_Latn")).all(axis=1)
        assert all(equal[row] for row, tokens in enumerate(dropped) if not tokens)
        assert not equal[1]
        assert not any(whole.dropped_tokens(texts))
        with pytest.raises(InputError):
            part.dropped_tokens("one text")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_that_was_not_kept_is_refused(family: str, pruned: Pruned) -> None:
    with Encoder.open(pruned(family)) as encoder:
        with pytest.raises(LanguageError, match="does not support German"):
            encoder.embed_texts(["ein Bild"], "deu_Latn")
        with pytest.raises(LanguageError):
            Encoder.open(pruned(family), default_language="ja")
        assert encoder.embed_texts(["uma foto"], "pt-BR").shape == (1, encoder.dim)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vocabulary_keeps_special_tokens_characters_and_the_normaliser(
    family: str, exported: Exported, pruned: Pruned
) -> None:
    before, after = Manifest.read(exported(family)), Manifest.read(pruned(family))
    files = [model.parent / m.variants["fp32"].tokenizer for model, m in
             ((exported(family), before), (pruned(family), after))]  # fmt: skip
    whole, part = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        assert part[name] == whole[name]
    tokenizers = [Subwords.from_file(str(path)) for path in files]
    for manifest, tokenizer in zip((before, after), tokenizers, strict=True):
        text = manifest.text
        assert [tokenizer.id_to_token(i) for i in (*text.prefix_ids, *text.suffix_ids)][-1] == "</s>"
        assert tokenizer.id_to_token(text.pad_id) == "<pad>"
        assert all(tokenizer.id_to_token(i) == code for code, i in text.language_ids.items())
    singles = {piece for piece in tokenizers[0].get_vocab() if len(piece) == 1}
    assert singles <= tokenizers[1].get_vocab().keys()
    assert "你" in singles or "水" in singles


# -- segmentation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept_by", KeptBy)
def test_texts_whose_tokens_are_all_kept_are_segmented_alike(
    family: str, kept_by: KeptBy, captions: dict[str, list[str]], tmp_path: Path
) -> None:
    """Every caption of every language, whatever was kept: no other segmentation arises."""
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(captions["eng_Latn"][:300]), encoding="utf-8")
    towers = cached_towers(family)
    part = pruned_towers(towers, VocabularyOptions(("eng", "fra"), (file,), kept_by))
    whole_tokenizer, tokenizer = (Subwords.from_str(one.tokenizer_json) for one in (towers, part))
    assert part.kept is not None
    new = {int(old): position for position, old in enumerate(part.kept.rows)}
    n_kept = n_dropped = 0
    for texts in captions.values():
        before = whole_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        after = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, one, other in zip(texts, before, after, strict=True):
            if all(number in new for number in one.ids):
                assert [new[number] for number in one.ids] == other.ids, text
                n_kept += 1
            else:
                n_dropped += 1
    assert n_kept > 300
    assert n_dropped > 10_000


_TOWERS: dict[str, Any] = {}


def cached_towers(name: str) -> Any:
    if name not in _TOWERS:
        _TOWERS[name] = towers_from_checkpoint(CHECKPOINTS / name)
    return _TOWERS[name]


SCORES = st.sampled_from([-1.0, -2.0, -3.0, -4.0, -2.5, -12.0])
"""Few and commensurable, so that many paths are equally good."""


@settings(max_examples=300)
@given(
    st.dictionaries(st.text("abc", min_size=2, max_size=4), SCORES, min_size=1, max_size=24),
    st.sets(st.sampled_from("abc"), min_size=1),
    st.lists(st.text("abcx", min_size=1, max_size=12), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_the_best_path_stays_the_best_and_the_first_of_equals(
    pieces: dict[str, float], characters: set[str], texts: list[str], chance: random.Random
) -> None:
    vocabulary = [("<unk>", 0.0), *((one, -6.0) for one in sorted(characters)), *pieces.items()]
    model = json.loads(Subwords(Unigram(vocabulary, unk_id=0, byte_fallback=False)).to_str())
    check_segmentation(model, texts, chance)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=24),
    st.lists(st.text("abcx", min_size=1, max_size=12), min_size=1, max_size=8),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_merges_behind_kept_pieces_are_kept(
    pairs: list[tuple[int, int]], texts: list[str], ignore_merges: bool, chance: random.Random
) -> None:
    pieces = ["a", "b", "c"]
    merges: list[tuple[str, str]] = []
    for left, right in pairs:
        pair = pieces[left % len(pieces)], pieces[right % len(pieces)]
        if pair not in merges and len("".join(pair)) <= 8:
            merges.append(pair)
            pieces += [] if "".join(pair) in pieces else ["".join(pair)]
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", *pieces])}
    bpe = BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, ignore_merges=ignore_merges)
    check_segmentation(json.loads(Subwords(bpe).to_str()), texts, chance)


def check_segmentation(data: dict[str, Any], texts: list[str], chance: random.Random) -> None:
    """Keep what some texts need, and compare all texts whose pieces are kept."""
    whole = Subwords.from_str(json.dumps(data))
    vocabulary = Subvocabulary.from_json(json.dumps(data))
    needed = {number for text in texts if chance.random() < 0.5 for number in whole.encode(text).ids}
    kept = sorted(vocabulary.closed({*needed, *chance.sample(sorted(vocabulary.pieces), k=1)}))
    part = Subwords.from_str(vocabulary.part(kept))
    for text in texts:
        ids = whole.encode(text).ids
        if set(ids) <= set(kept):
            assert [kept[number] for number in part.encode(text).ids] == ids
        else:
            assert set(part.encode(text).ids) <= set(range(len(kept)))


def test_a_vocabulary_that_cannot_be_pruned_is_refused() -> None:
    word_level = {"model": {"type": "WordLevel", "vocab": {"a": 0}}, "added_tokens": []}
    with pytest.raises(ExportError, match="WordLevel vocabulary cannot be pruned"):
        Subvocabulary.from_json(json.dumps(word_level))
    suffixed = {"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}}
    with pytest.raises(ExportError, match="end_of_word_suffix"):
        Subvocabulary.from_json(json.dumps(suffixed))


# -- graphs -----------------------------------------------------------------------------------------------

MADE_ON_CPU = [form for form in FORMS if form.engine is not Engine.TENSORRT]


@pytest.mark.parametrize("form", MADE_ON_CPU, ids=lambda form: form.key)
@pytest.mark.parametrize("family", ["nllb-clip", "capivara"])
def test_kept_rows_give_equal_vectors_in_every_precision(
    family: str, form: Form, exported: Exported, tmp_path: Path
) -> None:
    if form.engine is Engine.CUDA and family != "nllb-clip":
        pytest.skip("The table of a graph for CUDA is that of the other families")
    batches = batches_of(exported(family), Modality.TEXT)
    calibration = CalibrationSet("probes", 0, {}, batches[:2], ())
    target = tmp_path / "whole" / "model.onnx"
    target.parent.mkdir()
    form.make(
        GraphRequest(
            Modality.TEXT,
            graph_of(exported(family), Modality.TEXT),
            target,
            "data",
            max_batch_size=8,
            context_length=77,
            calibration=calibration,
        )
    )
    first = np.arange(
        Manifest.read(exported(family)).text.pad_id + 1
    )  # positions count from the padding's id
    rows = np.unique(np.concatenate([first, *(batch["input_ids"].ravel() for batch in batches)]))
    part = shutil.copytree(target.parent, tmp_path / "part") / target.name
    assert keep_token_rows(part, rows, data_name="data")
    assert not keep_token_rows(part, rows, data_name="data")
    assert part.stat().st_size < target.stat().st_size
    assert sorted(path.name for path in part.parent.iterdir()) == [target.name]
    if form.engine is Engine.CUDA:
        assert {len(table) for table in tables_of(part)} == {len(rows)}
        return  # its fused nodes run on a GPU
    renumbered: list[Batch] = [{**b, "input_ids": np.searchsorted(rows, b["input_ids"])} for b in batches]
    np.testing.assert_array_equal(vectors(part, renumbered), vectors(target, batches))


def test_a_graph_without_a_token_table_is_refused(exported: Exported, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    shutil.copy(graph_of(exported("altclip"), Modality.IMAGE), graph)
    before = graph.read_bytes()
    with pytest.raises(ExportError, match="looks up no token table"):
        keep_token_rows(graph, np.arange(3), data_name="data")
    shutil.copy(graph_of(exported("altclip"), Modality.TEXT), graph)
    with pytest.raises(ExportError, match="row 10000000 is kept"):
        keep_token_rows(graph, np.array([1, 10_000_000]), data_name="data")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert before


# -- what is kept -----------------------------------------------------------------------------------------


def test_characters_of_a_language_include_upper_case_and_loans() -> None:
    found = characters_of_languages(["por_Latn", "rus_Cyrl", "ace_Arab"])
    assert found.keys() == {"por_Latn", "rus_Cyrl"}
    assert set("ãÃçÇzZöÖ") <= found["por_Latn"]
    assert set("жЖёЁ") <= found["rus_Cyrl"]
    assert is_written_in("▁Ação", found["por_Latn"])
    assert is_written_in("▁3,14–€!", frozenset())
    assert not is_written_in("▁ação", found["rus_Cyrl"])
    assert not is_written_in("ß", found["por_Latn"])


@pytest.mark.parametrize("languages", ["por,eng,spa", "jpn,kor", "rus", "hin,tam", "arb,heb", "zho_Hans,tha"])
def test_captions_of_languages_in_every_script_need_few_other_tokens(
    languages: str, captions: dict[str, list[str]]
) -> None:
    """What CLDR's letters do not spell is Latin: abbreviations in names."""
    towers = cached_towers("nllb-clip")
    part = pruned_towers(towers, VocabularyOptions(languages_from_list(languages)))
    assert isinstance(part.reference, PrunedReference)
    assert part.n_tokens < 0.8 * towers.n_tokens
    for code in part.languages:
        texts = captions[code]
        needs = part.reference.needs_dropped(texts, [code] * len(texts))
        needing = [text for text, needs_it in zip(texts, needs, strict=True) if needs_it]
        latin = [text for text in needing if any("A" <= one.upper() <= "Z" for one in text)]
        assert len(needing) - len(latin) <= 0.01 * len(texts), needing[:9]


def test_texts_add_tokens_or_alone_decide(captions: dict[str, list[str]], tmp_path: Path) -> None:
    towers = cached_towers("capivara")
    table = pyarrow.table(
        {
            "text": ["Müller und Söhne in Łódź", "ein Apfel", "Äpfel ßß"],
            "language": ["eng_Latn", "deu_Latn", "deu_Latn"],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet")
    files = (tmp_path / "texts.parquet",)
    by_characters = pruned_towers(towers, VocabularyOptions(("eng",)))
    added = pruned_towers(towers, VocabularyOptions(("eng",), files))
    alone = pruned_towers(towers, VocabularyOptions(("eng",), files, KeptBy.TEXTS))
    assert alone.n_tokens < by_characters.n_tokens < added.n_tokens
    assert added.kept is not None
    (facts,) = added.kept.record.sources["texts"]
    assert facts["file"] == "texts.parquet"
    for part in (added, alone):
        assert not part.reference.needs_dropped(["Müller und Söhne in Łódź"], [None]).any()
    assert alone.reference.needs_dropped(["an unrelated sentence"], [None]).all()
    assert len({part.fingerprint for part in (towers, by_characters, added, alone)}) == 4


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"languages": ("xx-unknown",)}, LanguageError, "unknown"),
        ({"languages": ("quy",)}, LanguageError, "does not support"),
        ({"languages": ()}, ExportError, "No language"),
        ({"languages": ("eng",), "kept_by": KeptBy.TEXTS}, ExportError, "no text is given"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    options: dict[str, Any], error: type[BabeltowerError], says: str
) -> None:
    with pytest.raises(error, match=says):
        pruned_towers(cached_towers("altclip"), VocabularyOptions(**options))


def test_a_language_without_characters_needs_texts(tmp_path: Path) -> None:
    towers = cached_towers("nllb-clip")
    with pytest.raises(ExportError, match=r"no characters for Acehnese.*--vocabulary-texts"):
        pruned_towers(towers, VocabularyOptions(("eng", "ace_Latn")))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["peue haba"], "language": ["ace_Latn"]}), tmp_path / "texts.parquet"
    )
    part = pruned_towers(towers, VocabularyOptions(("eng", "ace_Latn"), (tmp_path / "texts.parquet",)))
    assert part.languages == ("ace_Latn", "eng_Latn")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "cannot be read"),
        ("latin1.txt", "maçã".encode("latin-1"), "cannot be read as UTF-8"),
        ("empty.txt", b"\n  \n", "has no text in eng_Latn"),
        ("texts.parquet", b"PAR1", "cannot be read as Parquet"),
    ],
)
def test_a_file_of_texts_that_cannot_be_read_is_an_error(
    name: str, content: bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=says):
        pruned_towers(cached_towers("altclip"), VocabularyOptions(("eng",), (path,)))


def test_a_table_of_texts_without_the_column_is_an_error(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a"]}), tmp_path / "texts.parquet")
    with pytest.raises(DatasetError, match="expected text"):
        pruned_towers(cached_towers("altclip"), VocabularyOptions(("eng",), (tmp_path / "texts.parquet",)))


# -- the model as a whole ---------------------------------------------------------------------------------


def test_an_index_of_the_whole_model_is_searched_with_a_pruned_one(
    exported: Exported, pruned: Pruned
) -> None:
    texts = ["a red apple", "um gato preto", "una casa"]
    with Encoder.open(exported("capivara")) as whole, Encoder.open(pruned("capivara")) as part:
        assert part.fingerprint != whole.fingerprint
        assert same_space(part.fingerprint, whole.fingerprint)
        index = Index(tuple(texts), whole.embed_texts(texts), whole.fingerprint)
        found = index.search(part.embed_texts(texts), fingerprint=part.fingerprint, k=1)
        assert [hits[0].id for hits in found] == texts
    with Encoder.open(pruned("altclip")) as other, pytest.raises(InputError, match="meaningless"):
        index.search(other.embed_texts(texts), fingerprint=other.fingerprint, k=1)


def test_variants_of_one_model_share_a_vocabulary(pruned: Pruned, tmp_path: Path) -> None:
    model = pruned("altclip")
    repository = shutil.copytree(model.parent, tmp_path / "repository")
    before = sorted(path.relative_to(repository) for path in repository.rglob("*"))
    forms = tuple(form for form in FORMS if form.key == "int8_onnxruntime")  # computed on every CPU
    for vocabulary in (None, VocabularyOptions(("eng", "deu"))):
        options = dataclasses.replace(QUICK, vocabulary=vocabulary, forms=forms, captions_per_language=1)
        with pytest.raises(ExportError, match="vocabulary of eng_Latn, por_Latn, spa_Latn"):
            repository_from_checkpoint(CHECKPOINTS / "altclip", repository, name="altclip", options=options)
    assert before == sorted(path.relative_to(repository) for path in repository.rglob("*"))


def test_the_gate_measures_what_dropped_tokens_cost(tmp_path: Path, captions: dict[str, list[str]]) -> None:
    """A vocabulary of English texts alone: Portuguese loses its words, and the gate says so."""
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(captions["eng_Latn"]), encoding="utf-8")
    vocabulary = VocabularyOptions(("eng", "por"), (file,), KeptBy.TEXTS)
    fp32 = dataclasses.replace(FORMS[0], opened_by=(Engine.ONNXRUNTIME,))
    options: ExportOptions = dataclasses.replace(
        FEW, vocabulary=vocabulary, forms=(fp32,), captions_per_language=None
    )
    with pytest.raises(ParityError, match=r"costs too much recall, even in PyTorch: mean over 2 languages"):
        repository_from_checkpoint(CHECKPOINTS / "nllb-clip", tmp_path / "models", options=options)
    accepted = dataclasses.replace(options, accept_drop=0.9)
    done = repository_from_checkpoint(CHECKPOINTS / "nllb-clip", tmp_path / "models", options=accepted)
    ((name, counts),) = done.manifest.vocabulary[0].needing.items()
    assert name == "emoji"
    assert counts["eng_Latn"]["n_needing"] == 0
    lost = counts["por_Latn"]
    assert lost["n_needing"] > lost["n_texts"] / 2
    assert lost["text_to_image"]["pruned"] < lost["text_to_image"]["whole"] - 0.1
    # the graphs agree with PyTorch all the same, for every probe, with the tokens that were kept
    assert done.parity["fp32"].token_ids_equal
    assert done.parity["fp32"].n_texts > 20


def test_a_changed_tokenizer_of_the_checkpoint_is_an_error(pruned: Pruned, tmp_path: Path) -> None:
    model = pruned("altclip")
    repository = shutil.copytree(model.parent, tmp_path / "repository")
    manifest = Manifest.read(model)
    path = (repository / manifest.variants["fp32"].tokenizer).with_name(WHOLE_TOKENIZER_FILE)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ManifestError, match="whole_tokenizer"):
        Encoder.open(repository / "altclip")
    encoder = LocalEncoder.from_repository(repository / "altclip", verify=False)
    with encoder, pytest.raises(ManifestError, match="cannot be compared"):
        encoder.dropped_tokens(["a"])


def test_a_server_and_its_clients_take_a_pruned_model_as_any_other(
    pruned: Pruned, server_environment: Any, captions: dict[str, list[str]]
) -> None:
    from runtime.server import running_server

    models = [pruned(family) for family in ("nllb-clip", "capivara")]
    with running_server(models[0].parent, environment=server_environment) as server:
        for model in models:
            with (
                Encoder.open(model) as local,
                Encoder.open(f"grpc://{server.addresses.grpc}/{model.name}") as remote,
            ):
                assert remote.fingerprint == local.fingerprint
                for language in LANGUAGES:
                    texts = captions[language][::40]
                    np.testing.assert_allclose(
                        remote.embed_texts(texts, language), local.embed_texts(texts, language), atol=1e-6
                    )
                with pytest.raises(LanguageError, match="does not support German"):
                    remote.embed_texts(["ein Bild"], "deu_Latn")


def test_commands_export_and_describe_a_pruned_model(tmp_path: Path) -> None:
    arguments = ["export", str(CHECKPOINTS / "altclip"), str(tmp_path / "models"), "--engine", "onnxruntime"]
    run = CliRunner().invoke(app, [*arguments, "--captions-per-language", "3", "--languages", "por, eng,spa"])
    assert run.exit_code == 0, run.output
    assert "tokens, kept by characters for eng_Latn, por_Latn, spa_Latn" in run.output
    assert "0 of 9 texts of emoji need a dropped token" in run.output
    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "models" / "altclip")])
    assert "tokens, kept by characters for eng_Latn, por_Latn, spa_Latn" in run.output
    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "models" / "altclip"), "--json"])
    assert json.loads(run.output)["vocabulary"][0]["languages"] == list(LANGUAGES)
    asked = ["inspect", str(tmp_path / "models" / "altclip"), "--text", "uma maçã", "--text", "שלום עולם"]
    run = CliRunner().invoke(app, asked)
    assert "'uma maçã' needs no dropped token" in run.output
    assert "'שלום עולם' needs ▁" in run.output
    run = CliRunner().invoke(app, ["languages", str(tmp_path / "models" / "altclip")])
    assert [line.split()[0] for line in run.output.splitlines()] == list(LANGUAGES)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vocabulary", "texts"], "add --languages"),
        (["--languages", "eng,,por"], "is not a list of languages"),
        (["--languages", "eng", "--vocabulary", "texts"], "--vocabulary-texts"),
    ],
)
def test_commands_refuse_options_that_do_not_fit(options: list[str], says: str, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["export", str(CHECKPOINTS / "altclip"), str(tmp_path), *options])
    assert run.exit_code == 1
    assert says in run.output
    assert len(run.output.strip().splitlines()) == 1


def test_a_tokenizer_without_kept_languages_takes_any(exported: Exported) -> None:
    model = exported("capivara")
    manifest = Manifest.read(model)
    tokenizer = Tokenizer(model.parent / manifest.variants["fp32"].tokenizer, manifest.text)
    for text in texts_with_languages(["a", "b"], ["deu", "quy"]):
        tokenizer.require_language(text)
    assert samples_folder().is_dir()
