"""Cleaning as rules of a tokenizer's file, against the cleaning itself."""

from __future__ import annotations

import pytest
from sample_models import CHECKPOINTS
from tokenizers import Tokenizer

from export.layouts.cleaning_rules import add_cleaning
from runtime.preprocessing.cleaning import clean_whitespace


@pytest.fixture(scope="module", params=["nllb-clip", "capivara"])
def tokenizers(request: pytest.FixtureRequest) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer as it is, and one with cleaning."""
    own, cleaning = (
        Tokenizer.from_file(str(CHECKPOINTS / request.param / "tokenizer.json")) for _ in range(2)
    )
    add_cleaning(cleaning)
    return own, Tokenizer.from_str(cleaning.to_str())


@pytest.mark.parametrize(
    "text",
    [
        "l’été “chaud” ‘froid’ „tief‟",
        "o\u02bbzbek tili gʼisht",
        "e\u0301te\u0301 decomposed",
        "한국어 \u1112\u1161\u11ab",
        "zero\ufeff width \u206a control",
        "ｆｕｌｌ　ｗｉｄｔｈ ﬁ ﬀ ŉ",
        "plain ascii",
        "<pad> a </s>",
        "ಕನ್ನಡ অসমীয়া क़लम",
        "～ tilde",
    ],
)
def test_the_rules_clean_as_the_function_does(text: str, tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    own, cleaning = tokenizers
    assert cleaning.encode(" ".join(text.split())).ids == own.encode(clean_whitespace(text)).ids


def test_the_rules_change_something(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    own, cleaning = tokenizers
    assert own.encode("l’été").ids != cleaning.encode("l’été").ids
