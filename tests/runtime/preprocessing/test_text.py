"""Token ids equal the reference tokenizers' own, in every language, and so does the cleaning before."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from random import Random

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_models import CHECKPOINTS
from tokenizers import Tokenizer as Subwords
from tokenizers import models, pre_tokenizers, trainers

from runtime import Encoder
from runtime.errors import InputError, LanguageError, ManifestError
from runtime.manifest import TextPreprocessing
from runtime.preprocessing.cleaning import (
    MOST_EXPANDED,
    clean_canonicalize,
    clean_lower,
    clean_whitespace,
    n_expanded,
)
from runtime.preprocessing.text import (
    _CHARACTERS_ALONE,
    Text,
    Tokenizer,
    _parts_of_bounded_length,
    texts_with_languages,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LANGUAGES = ["arb_Arab", "eng_Latn", "fra_Latn", "hin_Deva", "por_Latn", "tha_Thai", "zho_Hans"]
CONTEXT = 24
CORPUS = [
    "a photo of a cat on the grass",
    "um gato preto dorme sobre a cama",
    "un chien court après la balle",
    "قطة سوداء تنام على السرير",
    "एक बिल्ली बिस्तर पर सो रही है",
    "แมวดำนอนอยู่บนเตียง",
    "一只黑猫睡在床上",
    "двa кота сидят на окне",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "\n\t ",
    "  leading and   inner\tspace\r\n ",
    "</s>",
    "a </s> in the middle",
    "eng_Latn",
    "texto com por_Latn dentro, zho_Hansзнак",
    "<s> <pad> <unk> <mask>",
    "<pad>",
    "cafe\u0301 e\u0301tude",
    "cafés &amp; th&eacute;s &amp;lt;b&amp;gt;",
    "sÃ³ mojibake âœ” No problems",
    "ＬＯＵＤ　ＮＯＩＳＥＳ！",
    "“curly” ‘quotes’ ﬁne ﬂour ĳ",
    "\u200fعربي\u200e and \u200bzero\u200dwidth",
    "👨\u200d👩\u200d👧 🇧🇷 emoji 🐈\u200d⬛",
    "\x00\x07 control \x1b[31m red \x85 next",
    "\ufeffbom and \ufffc object",
    "a" * 500,
    "um gato " * 40,
    "界" * 100,
    "\u0915\u094d\u0937\u0924\u094d\u0930\u093f\u092f",
    "▁literal ▁ metaspace",
    "İstanbul ßẞ ŉ",
]


def trained(model, trainer):
    subwords = Subwords(model)
    subwords.pre_tokenizer = pre_tokenizers.Metaspace()
    subwords.train_from_iterator(CORPUS * 3, trainer)
    return json.loads(subwords.to_str())["model"]


def nllb_reference(folder):
    transformers = pytest.importorskip("transformers")
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    model = trained(models.BPE(), trainers.BpeTrainer(vocab_size=300, special_tokens=specials))
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = transformers.NllbTokenizer(
        model["vocab"],
        merges,
        extra_special_tokens=LANGUAGES,
        src_lang="eng_Latn",
        legacy_behaviour=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def xlmr_reference(folder):
    transformers = pytest.importorskip("transformers")
    model = trained(models.Unigram(), trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>"))
    pieces = [(piece, score) for piece, score in model["vocab"] if piece != "<unk>"]
    specials = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = transformers.XLMRobertaTokenizer([*specials, *pieces, ("<mask>", 0.0)])
    tokenizer.save_pretrained(folder)
    return tokenizer


def written(reference, path):
    data = json.loads(reference.backend_tokenizer.to_str())
    path.write_text(json.dumps({**data, "post_processor": None}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nllb")
    reference = nllb_reference(folder)
    preprocessing = TextPreprocessing(
        context_length=CONTEXT,
        pad_id=reference.pad_token_id,
        prefix_ids=(),
        suffix_ids=(reference.eos_token_id,),
        clean="whitespace",
        language_ids={code: reference.convert_tokens_to_ids(code) for code in LANGUAGES},
    )
    return folder, written(reference, folder / "runtime.json"), preprocessing


@pytest.fixture(scope="module")
def xlmr(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xlmr")
    reference = xlmr_reference(folder)
    preprocessing = TextPreprocessing(
        context_length=CONTEXT,
        pad_id=reference.pad_token_id,
        prefix_ids=(reference.bos_token_id,),
        suffix_ids=(reference.eos_token_id,),
        clean="none",
    )
    return reference, written(reference, folder / "runtime.json"), preprocessing


def ids(tokenizer, texts, language=None):
    return [row.ids for row in tokenizer.rows_from_texts(list(texts_with_languages(texts, language)))]


def unpadded(rows, pad_id):
    """Rows without the padding at their end; a text's own ``<pad>`` inside stays."""
    return [row[: max(i for i, token in enumerate(row, 1) if token != pad_id)] for row in rows]


@pytest.mark.parametrize("language", LANGUAGES)
def test_nllb_ids_equal_open_clip(nllb, language):
    open_clip = pytest.importorskip("open_clip.tokenizer")
    folder, path, preprocessing = nllb
    reference = open_clip.HFTokenizer(str(folder), context_length=CONTEXT, clean="whitespace")
    reference.tokenizer.src_lang = language  # set_language is undone by the tokenizer's next call
    expected = unpadded(reference(TEXTS).tolist(), preprocessing.pad_id)
    assert ids(Tokenizer(path, preprocessing), TEXTS, language) == expected


@pytest.mark.parametrize("name", ["nllb-clip", "nllb-siglip-mrl", "capivara", "altclip"])
def test_ids_of_a_sample_checkpoint_equal_open_clip_in_every_language(tmp_path, name):
    if not (CHECKPOINTS / name / "tokenizer.json").is_file():
        pytest.skip(f"{CHECKPOINTS / name} is not built")
    hf = pytest.importorskip("open_clip.tokenizer").HFTokenizer(
        str(CHECKPOINTS / name), context_length=CONTEXT
    )
    reference = hf.tokenizer
    codes = {
        t: i for t, i in reference.get_added_vocab().items() if re.fullmatch("[a-z]{3}_[A-Z][a-z]{3}", t)
    }
    preprocessing = TextPreprocessing(
        context_length=CONTEXT,
        pad_id=reference.pad_token_id,
        prefix_ids=() if codes else (reference.bos_token_id,),
        suffix_ids=(reference.eos_token_id,),
        clean="whitespace",
        language_ids=codes,
    )
    tokenizer = Tokenizer(written(reference, tmp_path / "tokenizer.json"), preprocessing)
    assert differing_languages(tokenizer, hf, sorted(codes) or [None], preprocessing.pad_id) == []


def differing_languages(tokenizer, hf, codes, pad_id):
    differing = []
    for code in codes:
        if code is not None:
            hf.tokenizer.src_lang = code
        if ids(tokenizer, TEXTS, code) != unpadded(hf(TEXTS).tolist(), pad_id):
            differing.append(code)
    return differing


def test_xlmr_ids_equal_transformers(xlmr):
    reference, path, preprocessing = xlmr
    expected = reference(TEXTS, truncation=True, max_length=CONTEXT)["input_ids"]
    assert ids(Tokenizer(path, preprocessing), TEXTS) == expected


@given(st.lists(st.text(max_size=60), min_size=1, max_size=8))
@settings(max_examples=100)
def test_xlmr_ids_equal_transformers_on_any_text(xlmr, texts):
    reference, path, preprocessing = xlmr
    expected = reference(texts, truncation=True, max_length=CONTEXT)["input_ids"]
    assert ids(Tokenizer(path, preprocessing), texts) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_cleaning_equals_open_clip(text):
    assert clean_whitespace(text) == open_clip_clean(text)


MOJIBAKE = st.text("Ãâ€œ™Â©sÅ½Ð°Ñ‚ ×žï¬ÂÃ³\xa0\xad°²´«»¿ŒœØÙ€", max_size=12)
SCRIPTS = st.text(
    st.characters(codec="utf-8", categories=["L", "M", "N", "P", "Z", "S", "Cf", "Cc"]), max_size=40
)
ENTITIES = st.sampled_from(
    ["&amp;", "&lt;", "&#x26;amp;", "&eacute", "<b>", "\r\n", "\u2028", "\x1b[0m", "\u3000"]
)


@given(st.lists(st.one_of(MOJIBAKE, SCRIPTS, ENTITIES, st.text(max_size=10)), max_size=6).map("".join))
@example("Â a\nÂ b")
@example("a\x0bb\x1cc\x85d\u2028e")
@example("It's A_b: ΣΊΣΥΦΟΣ İ")
@settings(max_examples=1500)
def test_cleaning_equals_open_clip_on_any_text(text):
    assert clean_whitespace(text) == open_clip_clean(text)
    assert clean_lower(text) == open_clip_clean(text, "lower")
    assert clean_canonicalize(text) == open_clip_clean(text, "canonicalize")


@pytest.mark.parametrize("start", range(0, 0x30000, 0x4000), ids=hex)
def test_cleaning_equals_open_clip_on_every_character(start):
    characters = [chr(i) for i in range(start, start + 0x4000) if not 0xD800 <= i <= 0xDFFF]
    wrong = [c for c in characters if clean_whitespace(f"a{c}b") != open_clip_clean(f"a{c}b")]
    assert wrong == []


def open_clip_clean(text, kind="whitespace"):
    return pytest.importorskip("open_clip.tokenizer").get_clean_fn(kind)(text)


def test_texts_of_a_fixed_length_are_padded_to_it(nllb):
    _, path, preprocessing = nllb
    fixed = dataclasses.replace(preprocessing, padding="context")
    usual = Tokenizer(path, preprocessing).rows_from_texts(list(texts_with_languages(TEXTS, "por_Latn")))
    rows = Tokenizer(path, fixed).rows_from_texts(list(texts_with_languages(TEXTS, "por_Latn")))
    assert {len(row.ids) for row in rows} == {fixed.context_length}
    for row, short in zip(rows, usual, strict=True):
        assert row.ids == short.ids + [fixed.pad_id] * (fixed.context_length - len(short.ids))
        assert row.truncated == short.truncated


@pytest.mark.parametrize("field", ["padding", "clean"])
def test_an_unknown_kind_of_text_is_refused(field):
    with pytest.raises(ManifestError, match=f"{field} 'left' is unknown; expected one of"):
        TextPreprocessing(
            **{
                "context_length": 8,
                "pad_id": 1,
                "prefix_ids": (),
                "suffix_ids": (2,),
                "clean": "none",
                field: "left",
            }
        )


def test_languages_beside_it_change_nothing(nllb):
    _, path, preprocessing = nllb
    tokenizer = Tokenizer(path, preprocessing)
    together = ids(tokenizer, CORPUS[:7], LANGUAGES)
    alone = [ids(tokenizer, [text], language)[0] for text, language in zip(CORPUS, LANGUAGES, strict=False)]
    assert together == alone
    assert [row[0] for row in together] == [preprocessing.language_ids[code] for code in LANGUAGES]


@pytest.mark.parametrize("code", ["por_Latn", "pt", "pt-BR", "POR-latn", "por"])
def test_every_spelling_of_a_language_is_one(nllb, code):
    _, path, preprocessing = nllb
    tokenizer = Tokenizer(path, preprocessing)
    assert ids(tokenizer, ["um gato"], code) == ids(tokenizer, ["um gato"], "por_Latn")


def test_the_default_language_stands_in_and_gives_way(nllb):
    _, path, preprocessing = nllb
    tokenizer = Tokenizer(path, preprocessing, default_language="pt")
    assert ids(tokenizer, ["a"])[0][0] == preprocessing.language_ids["por_Latn"]
    assert ids(tokenizer, ["a"], "fr")[0][0] == preprocessing.language_ids["fra_Latn"]


def test_cut_texts_are_marked_and_keep_their_special_tokens(nllb):
    _, path, preprocessing = nllb
    texts = list(texts_with_languages(["um gato", "um gato " * 40, ""], "pt"))
    rows = Tokenizer(path, preprocessing).rows_from_texts(texts)
    assert [row.truncated for row in rows] == [False, True, False]
    assert len(rows[1].ids) == CONTEXT
    assert rows[1].ids[-1] == preprocessing.suffix_ids[0]
    assert rows[2].ids == [preprocessing.language_ids["por_Latn"], *preprocessing.suffix_ids]


@pytest.mark.parametrize(
    ("language", "message"),
    [
        (None, r"needs the language of every text. Pass language=\.\.\., e\.g\."),
        ("xx", "'xx' is unknown"),
        ("portugese", "closest: por_Latn"),
        ("deu_Latn", r"does not support German \(deu_Latn\); it supports 7 languages"),
        (["por_Latn", "nonsense"], "'nonsense' is unknown"),
        ([None, "pt"], "needs the language"),
        ([3, 4], "The language of text 0 is of type int"),
    ],
)
def test_a_language_that_does_not_fit_is_an_error(nllb, language, message):
    _, path, preprocessing = nllb
    with pytest.raises(LanguageError, match=message):
        ids(Tokenizer(path, preprocessing), ["um gato", "dois"], language)


def test_a_bad_default_language_fails_at_once(nllb):
    _, path, preprocessing = nllb
    with pytest.raises(LanguageError, match="does not support"):
        Tokenizer(path, preprocessing, default_language="deu_Latn")


def test_a_tower_without_language_tokens_checks_the_language_and_ignores_it(xlmr):
    _, path, preprocessing = xlmr
    tokenizer = Tokenizer(path, preprocessing)
    assert ids(tokenizer, ["um gato"], "pt") == ids(tokenizer, ["um gato"])
    with pytest.raises(LanguageError, match="'xx' is unknown"):
        ids(tokenizer, ["um gato"], "xx")


@pytest.mark.parametrize("languages", [["pt"], ["pt", "fr", "en"], []])
def test_one_language_per_text_or_none(languages):
    with pytest.raises(InputError, match="one language for all texts, or one per text"):
        list(texts_with_languages(["um", "dois"], languages))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a bare string", "pass a list of strings"),
        (b"bytes", "pass a list of strings"),
        (["a", 3], "Text 1 is of type int; expected str"),
        (["a", None], "Text 1 is of type NoneType"),
        ([b"a"], "Text 0 is of type bytes"),
        ({"text": ["a"]}, r"texts is a table of type dict; pass one of its columns.*embedded_batches"),
        (pa.table({"text": ["a"]}), r"texts is a table of type Table; pass one of its columns"),
        (None, "texts is of type NoneType; expected an iterable of strings"),
        (5, "texts is of type int; expected an iterable of strings"),
    ],
)
def test_what_is_no_text_is_an_error(texts, message):
    with pytest.raises(InputError, match=message):
        list(texts_with_languages(texts, None))


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00", "a\udfff b", "\udc31\ud83d"])
def test_half_a_character_is_an_error(nllb, xlmr, text):
    for _, path, preprocessing in (nllb, xlmr):
        with pytest.raises(InputError, match="Text 1 holds a lone surrogate"):
            ids(Tokenizer(path, preprocessing), ["fine", text], "pt")


def test_a_character_in_two_halves_is_joined(xlmr):
    _, path, preprocessing = xlmr
    tokenizer = Tokenizer(path, preprocessing)
    assert ids(tokenizer, ["\ud83d\udc08 gato"]) == ids(tokenizer, ["🐈 gato"])


def test_texts_are_read_lazily():
    def endless():
        while True:
            yield "a"

    texts = texts_with_languages(endless(), "pt")
    assert next(texts).index == 0
    assert next(texts).index == 1


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": '])
def test_a_broken_tokenizer_is_an_error(tmp_path, xlmr, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ManifestError, match=r"Tokenizer .*tokenizer\.json (is missing|cannot be read)"):
        Tokenizer(path, xlmr[2])


@pytest.mark.parametrize("language", [5, 1.5, b"por_Latn", {"por_Latn", "eng_Latn"}, object()])
def test_languages_are_a_code_or_a_sequence_of_codes(language: object) -> None:
    with pytest.raises(LanguageError, match="expected one code, such as 'por_Latn', or a sequence"):
        texts_with_languages(["a", "b"], language)  # type: ignore[arg-type]


def long_texts() -> Iterator[str]:
    words = (
        "gato",
        "the",
        "猫が好き",
        "σκύλος",
        "naïve",
        "e\u0301te\u0301",
        "<mask>",
        "&amp;",
        "12,5",
        "🐈‍⬛",
    )
    random = Random(3)
    yield " ".join(random.choices(words, k=20_000))
    yield "".join(random.choices(words, k=20_000))
    yield "\n\n".join(random.choices(words, k=20_000))
    yield "a" * 50_000
    yield "ab" * 25_001
    yield "。".join(random.choices("犬猫鳥魚", k=30_000))
    yield " " * 30_000 + "a cat " * 5_000
    yield "\u200b" * 30_000 + "a cat"
    yield "x" * 3_000 + " y" * 3_000
    yield "&lt;" * 10_000
    yield "schÃ¶n " * 5_000
    yield "a \u0308" * 9_000
    yield "😀" * 20_000


@pytest.fixture(scope="module", params=["altclip", "capivara", "nllb-clip"])
def sample_encoder(request, exported):
    with Encoder.open(exported(request.param), threads=1, default_language="en") as encoder:
        yield encoder


@pytest.mark.parametrize("number", range(13))
def test_a_long_text_is_shortened_to_the_same_tokens(sample_encoder, number):
    text = list(long_texts())[number]
    short = sample_encoder.shortened_text(text)
    assert text.startswith(short)
    assert sample_encoder.token_rows([Text(short, 0, None)]) == sample_encoder.token_rows(
        [Text(text, 0, None)]
    )
    if number in (0, 2):
        assert len(short) < len(text) / 5


def test_texts_are_tokenized_in_parts_of_bounded_length(xlmr):
    _, path, preprocessing = xlmr
    tokenizer = Tokenizer(path, preprocessing)
    long = ["\ufdfa" * 16_384, "", "a cat", "x y " * 200_000] * 2
    texts = [Text(text, i, None) for i, text in enumerate(long)]
    cleaned = [text.text for text in texts]
    parts = [cleaned[part] for part in _parts_of_bounded_length(cleaned)]
    assert list(itertools.chain.from_iterable(parts)) == cleaned
    assert [len(part) for part in parts] == [3, 1, 3, 1]
    assert n_expanded("\ufdfa") == 18
    assert tokenizer.rows_from_texts(texts) == [tokenizer.rows_from_texts([text])[0] for text in texts]
    assert tokenizer.rows_from_texts([]) == []


def test_no_character_becomes_more_than_are_allowed_for():
    characters = map(chr, range(sys.maxunicode + 1))
    assert max(len(unicodedata.normalize("NFKC", character)) for character in characters) == MOST_EXPANDED


def test_texts_have_the_same_tokens_one_by_one_and_in_a_batch(xlmr):
    _, path, preprocessing = xlmr
    tokenizer = Tokenizer(path, preprocessing)
    few = list(texts_with_languages(CORPUS, None))
    assert sum(map(len, CORPUS)) <= _CHARACTERS_ALONE
    many = few * (1 + _CHARACTERS_ALONE // sum(map(len, CORPUS)))
    rows = tokenizer.rows_from_texts(few)
    assert tokenizer.rows_from_texts(many) == rows * (len(many) // len(few))


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), st.integers(50, 400))
def test_any_long_text_is_shortened_to_the_same_tokens(xlmr, piece, times):
    _, path, preprocessing = xlmr
    tokenizer = Tokenizer(path, preprocessing)
    text = piece * times
    short = tokenizer.shortened(text)
    assert tokenizer.rows_from_texts([Text(short, 0, None)]) == tokenizer.rows_from_texts(
        [Text(text, 0, None)]
    )
