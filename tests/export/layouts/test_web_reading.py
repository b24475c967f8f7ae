"""The page's modules read texts as the runtime does, token for token; run in Node."""

from __future__ import annotations

import itertools
import random
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from web_pages import captions_of, needs_node, npm_packages, run_node, towers_of

from export.layouts.web.cleaning import cleaning_rules, javascript_pattern
from export.layouts.web.layout import page_text
from export.layouts.web.packages import copy_packages
from export.layouts.web.probes import is_read_alike
from export.parity.probes import AWKWARD
from export.towers import Towers
from export.vocabulary.selection import tokenizer_from_json
from runtime.preprocessing.cleaning import clean_canonicalize, clean_lower, clean_whitespace
from runtime.preprocessing.text import Text

pytestmark = needs_node

LANGUAGES = ("por_Latn", "eng_Latn", "jpn_Jpan", "arb_Arab", "hin_Deva", "tha_Thai", "kor_Hang", "mal_Mlym")
PAGE = Path(sys.modules["export.layouts.web"].__path__[0]) / "page"

READ = """
import { readFileSync } from "node:fs";
import { TextReader } from "./text.js";
const { text, tokenizer, rows } = JSON.parse(readFileSync("inputs.json"));
const reader = new TextReader(text, JSON.parse(tokenizer));
const found = rows.map(([one, language]) => reader.read(one, language));
process.stdout.write(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's modules and libraries, without a model."""
    folder = tmp_path_factory.mktemp("page")
    for file in PAGE.glob("*.js"):
        (folder / file.name).write_bytes(file.read_bytes())
    copy_packages(folder / "vendor", npm_packages())
    return folder


def ids_of_runtime(towers: Towers, rows: Sequence[tuple[str, str]]) -> list[list[int]]:
    tokenizer = tokenizer_from_json(towers.tokenizer_json, towers.text_preprocessing)
    texts = [Text(text, i, language) for i, (text, language) in enumerate(rows)]
    return [row.ids for row in tokenizer.rows_from_texts(texts)]


def require_same_ids(towers: Towers, rows: Sequence[tuple[str, str]], page: Path, work: Path) -> None:
    text = page_text(towers, longest=1 << 20)
    inputs = {"text": text, "tokenizer": towers.tokenizer_json, "rows": rows}
    found = run_node(page, READ, inputs, work)
    wanted = ids_of_runtime(towers, rows)
    differing = [
        row
        for row, read, ids in zip(rows, found, wanted, strict=True)
        if read["ids"] != ids and not any("special token" in note for note in read["notes"])
    ]
    assert not differing, differing[:5]


@pytest.mark.parametrize(
    ("sample", "languages"),
    [
        ("nllb-clip", ""),
        ("nllb-clip", "por,eng,jpn,arb,hin,tha,kor,mal"),
        ("capivara", ""),
        ("capivara", "por,eng,jpn,arb,hin,tha,kor,mal"),
        ("altclip", ""),
    ],
)
def test_all_captions_have_the_tokens_of_the_runtime(
    sample: str, languages: str, page: Path, tmp_path: Path
) -> None:
    rows = [(text, code) for code in LANGUAGES for text in captions_of(code)]
    assert len(rows) > 14_000
    require_same_ids(towers_of(sample, languages), rows, page, tmp_path)


def awkward_texts() -> list[str]:
    """Texts of random characters of all scripts, joined marks, special tokens spelt out, and long ones."""
    noise = random.Random(7)
    letters = [chr(code) for code in range(0x20, 0x2FFFF) if unicodedata.category(chr(code))[0] in "LMNPSZ"]
    found = [text for text in AWKWARD if is_read_alike(text)]
    found += ["".join(noise.choices(letters, k=noise.randint(1, 12))) for _ in range(4_000)]
    marks = [letter for letter in letters if unicodedata.category(letter)[0] == "M"]
    found += [
        "".join(
            noise.choice(letters) + "".join(noise.choices(marks, k=noise.randint(0, 2))) for _ in range(5)
        )
        for _ in range(2_000)
    ]
    tokens = [
        "<s>",
        "</s>",
        "<pad>",
        "<unk>",
        "<mask>",
        "por_Latn",
        "▁",
        " ",
        "a",
        "ﬁ",
        "＜ｍａｓｋ＞",
        "\u200d",
    ]
    found += ["".join(noise.choices(tokens, k=4)) for _ in range(400)]
    found += ["\u1100\u1161\u11a8 \uac00\u11a8 \uff76\uff9e \u0130I\u0307 ½ ℃ ㍿", "word " * 300, "अ" * 1_000]
    return [text for text in found if is_read_alike(text)]


@pytest.mark.parametrize("sample", ["nllb-clip", "capivara", "altclip"])
def test_awkward_texts_have_the_tokens_of_the_runtime(sample: str, page: Path, tmp_path: Path) -> None:
    texts = awkward_texts()
    assert len(texts) > 5_000
    require_same_ids(towers_of(sample), [(text, "eng_Latn") for text in texts], page, tmp_path)


CLEAN = """
import { readFileSync } from "node:fs";
import { TextReader } from "./text.js";
const { cleaning, texts } = JSON.parse(readFileSync("inputs.json"));
const reader = Object.create(TextReader.prototype);
const { replaced, spaces, mojibake, references, punctuation } = cleaning;
Object.assign(reader, {
  text: { cleaning },
  replaced: new Map(replaced),
  spaces: new RegExp(`[${spaces}]+`, "u"),
  mojibake: new RegExp(mojibake, "u"),
  references: new RegExp(references, "u"),
  punctuation: new RegExp(`[${punctuation}]`, "gu"),
});
const found = texts.map((text) => [reader.clean(text), reader.cleaningNotes(text).length]);
process.stdout.write(JSON.stringify(found));
"""

CLEANINGS = {"whitespace": clean_whitespace, "lower": clean_lower, "canonicalize": clean_canonicalize}


def cleaned_by_page(kind: str, texts: list[str], page: Path, work: Path) -> list[Any]:
    found: list[Any] = run_node(page, CLEAN, {"cleaning": cleaning_rules(kind), "texts": texts}, work)
    return found


@pytest.mark.parametrize("kind", CLEANINGS)
def test_every_character_is_cleaned_as_by_the_runtime(kind: str, page: Path, tmp_path: Path) -> None:
    """Those that only longer passages show, C1 controls, are told instead."""
    known = "".join(
        chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    )
    texts = [f"A{character}a, {character}" for character in known]
    found = cleaned_by_page(kind, texts, page, tmp_path)
    clean = CLEANINGS[kind]
    differing = [
        text
        for text, (cleaned, n_notes) in zip(texts, found, strict=True)
        if cleaned != clean(text) and n_notes == 0
    ]
    assert not differing, differing[:10]
    assert sum(n_notes > 0 for _, n_notes in found) < 300


def test_whatever_the_runtime_mends_is_told(page: Path, tmp_path: Path) -> None:
    """HTML references, texts decoded wrongly, terminal escapes."""
    noise = random.Random(3)
    names = [text for code in LANGUAGES for text in noise.sample(captions_of(code), 60)]
    codecs = ("windows-1252", "windows-1251", "latin-1", "macroman", "iso-8859-2", "cp437")
    texts = []
    for name, codec in itertools.product(names, codecs):
        try:
            texts.append(name.encode().decode(codec))
        except UnicodeDecodeError:
            continue
    texts += [
        f"{name} {end}"
        for name in names[:60]
        for end in ("&amp; co", "&#233;", "&#xe9", "&eacute", "\x1b[31m")
    ]
    texts += ["R&B", "AT&T", "salt & pepper", "a &b; c", "x\x93quoted\x94"]
    found = cleaned_by_page("whitespace", texts, page, tmp_path)
    untold = [
        text
        for text, (cleaned, n_notes) in zip(texts, found, strict=True)
        if cleaned != clean_whitespace(text) and not n_notes
    ]
    assert not untold, untold[:5]
    told = dict(zip(texts, found, strict=True))
    assert [told[text][1] for text in ("R&B", "AT&T", "salt & pepper", "a &b; c")] == [0, 0, 0, 1]


def test_captions_are_never_taken_for_texts_to_mend(page: Path, tmp_path: Path) -> None:
    texts = [text for code in LANGUAGES for text in captions_of(code)]
    found = cleaned_by_page("whitespace", texts, page, tmp_path)
    assert [cleaned for cleaned, _ in found] == [clean_whitespace(text) for text in texts]
    assert sum(n_notes for _, n_notes in found) == 0


def test_a_verbose_pattern_is_translated() -> None:
    pattern = re.compile(r"[^a-c#\x41^] \s? # a comment [with] brackets" "\n  | é[ ]", re.VERBOSE)
    space = r"[\s\u{1c}-\u{1f}\u{85}]"
    negated = r"[^\u{61}-\u{63}\u{23}\u{41}\u{5e}]"
    assert javascript_pattern(pattern) == rf"{negated}{space}?|é[\u{{20}}]"


SEARCH = """
import { readFileSync } from "node:fs";
import { Gallery, floatsFromHalves } from "./gallery.js";
const { halves, dim, queries, k } = JSON.parse(readFileSync("inputs.json"));
const gallery = new Gallery(floatsFromHalves(Uint8Array.from(halves)), dim);
process.stdout.write(JSON.stringify(queries.map((query) => gallery.nearest(Float32Array.from(query), k))));
"""


def test_the_gallery_ranks_as_numpy_does(page: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(5)
    rows = noise.standard_normal((200, 24)).astype(np.float16)
    rows[0, :6] = [0, -0.0, 6e-8, 6.1e-5, 65504, -1]  # zero, subnormal, smallest normal, largest
    queries = noise.standard_normal((5, 24)).astype(np.float32)
    inputs = {"halves": list(rows.tobytes()), "dim": 24, "queries": queries.tolist(), "k": 9}
    found = run_node(page, SEARCH, inputs, tmp_path)
    for hits, scores in zip(found, queries @ rows.astype(np.float32).T, strict=True):
        assert [hit["row"] for hit in hits] == np.argsort(-scores, kind="stable")[:9].tolist()
        assert np.allclose([hit["score"] for hit in hits], np.sort(scores)[::-1][:9], rtol=1e-5)
