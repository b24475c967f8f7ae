"""Metrics against brute force, on vectors small and coarse enough to tie often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.retrieval import metrics
from export.retrieval.metrics import KS, Relevance, RetrievalProtocol


def brute_top(queries, items, k):
    scores = queries @ items.T
    return [sorted(range(len(items)), key=lambda i: (-row[i], i))[:k] for row in scores]


def brute_recall(top, pairs, n_queries, protocol, k):
    shares = []
    for query in range(n_queries):
        answers = {item for q, item in pairs if q == query}
        if answers:
            found = len(answers & set(top[query][:k]))
            shares.append(float(found > 0) if protocol is RetrievalProtocol.ANY else found / len(answers))
    return sum(shares) / len(shares)


@st.composite
def searches(draw):
    """Integer vectors (scores exact, ties common) and any relation with at least one pair."""
    n_queries, n_items = draw(st.integers(1, 9)), draw(st.integers(1, 25))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (n_queries, 3)).astype(np.float32)
    items = rng.integers(-2, 3, (n_items, 3)).astype(np.float32)
    every = [(q, i) for q in range(n_queries) for i in range(n_items)]
    pairs = draw(st.lists(st.sampled_from(every), min_size=1, max_size=40, unique=True))
    return queries, items, pairs


def relevance_of(pairs, n_queries, n_items):
    q, i = np.array(pairs, dtype=np.int64).T
    return Relevance(q, i, n_queries, n_items)


@given(searches(), st.integers(1, 12))
def test_top_items_is_the_full_sort(search, k):
    queries, items, _ = search
    assert metrics.top_items(queries, items, k).tolist() == brute_top(queries, items, k)


@given(searches(), st.sampled_from(RetrievalProtocol))
def test_recall_is_brute_force(search, protocol):
    queries, items, pairs = search
    relevance = relevance_of(pairs, len(queries), len(items))
    found = metrics.recall(metrics.top_items(queries, items), relevance, protocol)
    top = brute_top(queries, items, max(KS))
    expected = {k: brute_recall(top, pairs, len(queries), protocol, k) for k in KS}
    assert found.at == pytest.approx(expected)
    assert found.n_queries == len({q for q, _ in pairs})
    assert found.mean == pytest.approx(sum(expected.values()) / 3)


@given(searches())
def test_small_blocks_change_nothing(search):
    queries, items, _ = search
    whole = metrics.top_items(queries, items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK_SCORES", 30)
        assert metrics.top_items(queries, items).tolist() == whole.tolist()


@given(searches())
def test_margins_decide_the_hit(search):
    queries, items, pairs = search
    relevance = relevance_of(pairs, len(queries), len(items))
    rows = np.arange(len(queries))
    margins = metrics.decision_margins(queries, items, relevance, rows, 1)
    scores = queries @ items.T
    for row in rows:
        answers = [i for q, i in pairs if q == row]
        others = [i for i in range(len(items)) if i not in answers]
        if answers and others:
            assert margins[row] == abs(scores[row, answers].max() - scores[row, others].max())
        else:
            assert margins[row] == np.inf


def test_reversed_asks_from_the_other_side():
    relevance = relevance_of([(0, 0), (1, 0), (2, 1)], 3, 2)
    assert relevance.reversed().n_answers().tolist() == [2, 1]
    assert relevance.reversed().hits(np.array([[1, 2], [2, 0]])).tolist() == [[True, False], [True, False]]


def test_copies_of_an_item_tie_wherever_they_stand():
    rng = np.random.default_rng(7)
    base = rng.standard_normal((50, 129)).astype(np.float32)
    items = np.concatenate([base, base, base[:13]])
    top = metrics.top_items(rng.standard_normal((33, 129)).astype(np.float32), items, 4)
    assert (top[:, 1] - top[:, 0] == 50).all()
    assert (top[:, 0] < 50).all()


def test_fraction_cannot_pass_one_in_five_at_k_1():
    relevance = relevance_of([(0, i) for i in range(5)], 1, 10)
    top = np.arange(10)[None]
    assert metrics.recall(top, relevance, RetrievalProtocol.FRACTION).at == {1: 0.2, 5: 1.0, 10: 1.0}
    assert metrics.recall(top, relevance, RetrievalProtocol.ANY).at == {1: 1.0, 5: 1.0, 10: 1.0}


def test_any_hits():
    relevance = relevance_of([(0, 3), (1, 1)], 2, 4)
    top = np.array([[0, 3, 1], [0, 2, 3]])
    assert metrics.any_hits(top, relevance, 1).tolist() == [False, False]
    assert metrics.any_hits(top, relevance, 2).tolist() == [True, False]


def test_agreement_measures_rows():
    left = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    right = np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]], dtype=np.float32)
    found = metrics.agreement(left, right)
    assert found.cosine_min == pytest.approx(0.8)
    assert found.worst_row == 1
    assert found.max_abs_diff == pytest.approx(0.6)
    assert found.cosine_mean == pytest.approx((1 + 0.8 + 1) / 3)
    assert found.cosine_p1 == pytest.approx(np.percentile([1, 0.8, 1], 1))


def test_overlap_ignores_order():
    assert metrics.top_overlap(np.array([[1, 2, 3, 4]]), np.array([[4, 3, 9, 8]])) == 0.5


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([(0, 0), (0, 0)], "twice"), ([(2, 0)], "queries lie in"), ([(0, 5)], "items lie in")],
)
def test_malformed_pairs_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        relevance_of(pairs, 2, 3)


def test_recall_of_nothing_is_refused():
    none = np.empty(0, dtype=np.int64)
    with pytest.raises(ValueError, match="No query has a relevant item"):
        metrics.recall(np.zeros((2, 1), dtype=np.int64), Relevance(none, none, 2, 1))


def test_shapes_must_match():
    with pytest.raises(ValueError, match="shapes"):
        metrics.agreement(np.ones((2, 3), dtype=np.float32), np.ones((3, 2), dtype=np.float32))
