"""The demo's searches: sensible queries in twelve languages, and how many of them the sample answers."""

from __future__ import annotations

import pytest
from sample_models import ROOT, Exported

from bench.accuracy.evaluation import EvaluationSettings, evaluate
from bench.accuracy.searches import Search, named_searches
from bench.datasets import read
from bench.demo import SAMPLE, SEARCHES

N_WANTED = 10


@pytest.fixture(scope="module")
def searches(exported: Exported) -> tuple[Search, ...]:
    emoji = read("emoji").select([code for code, _ in SEARCHES])
    done = evaluate(ROOT / SAMPLE, exported(SAMPLE.name), emoji, EvaluationSettings())
    return named_searches(done, SEARCHES)


def test_every_query_is_in_another_language_and_for_another_picture(searches: tuple[Search, ...]) -> None:
    assert len(searches) == len(SEARCHES) == 12
    assert len({search.code for search in searches}) == 12
    assert len({key for _, key in SEARCHES}) == 12


def test_a_search_is_found_if_its_picture_is_among_the_five_shown(searches: tuple[Search, ...]) -> None:
    keys = [key for _, key in SEARCHES]
    for search, key in zip(searches, keys, strict=True):
        assert len(search.exported) == 5
        assert search.is_found == (key in [answer.key for answer in search.exported])


@pytest.mark.xfail(reason="nine of twelve with an hour of training: it misses 🐪, 🍣 and ☕", strict=True)
def test_the_sample_finds_what_most_queries_name(searches: tuple[Search, ...]) -> None:
    assert sum(search.is_found for search in searches) >= N_WANTED
