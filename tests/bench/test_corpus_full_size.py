"""The corpus benchmark at true size: its loops compute what they should, its shares and records are right."""

from __future__ import annotations

import numpy as np
import pytest

from bench.corpora.full_size import _Busy, _text_record, _Way
from bench.corpora.inputs import texts_of
from bench.corpora.loops import LOOPS, TimedLoop, timed_loop
from bench.corpus import _is_of
from bench.records.record import record_of
from runtime.machine import n_cores


def test_every_turn_has_other_texts():
    for corpus in ("captions", "generated"):
        assert texts_of(corpus, 50, seed=1) == texts_of(corpus, 50, seed=1)
        assert texts_of(corpus, 50, seed=1) != texts_of(corpus, 50, seed=2)


@pytest.mark.parametrize("name", ["capivara", "nllb-clip"])
def test_the_loops_compute_the_same_vectors(checkpoints, name):
    texts = texts_of("captions", 40)
    found = {way: timed_loop(way, checkpoints / name, texts) for way in LOOPS[:2]}
    assert all(timed.error is None and timed.rows == 40 for timed in found.values())
    cosines = (found["plain"].vectors * found["open_clip"].vectors).sum(axis=1)
    assert cosines.min() > 0.99999
    assert 0 < found["plain"].padding < found["open_clip"].padding < 1


def test_sentence_transformers_encodes_the_checkpoint(checkpoints):
    pytest.importorskip("sentence_transformers")
    timed = timed_loop("sentence-transformers", checkpoints / "capivara", ["a cat", "um gato"])
    assert (timed.error, timed.rows) == (None, 2)


def test_busy_is_told_second_by_second_up_to_the_last_batch():
    cores = n_cores()
    busy = _Busy(
        [(10.0, 1.0 * cores), (11.0, 1.9 * cores), (12.0, 2.9 * cores), (13.0, 3.0 * cores)],
        (12.5, 3.3 * cores),
    )
    assert busy.shares() == pytest.approx((0.9, 1.0, 0.8))
    assert _Busy().shares() == ()


def test_a_way_that_cannot_run_is_a_record_that_says_why():
    ways = {
        way: _Way([TimedLoop(10, 2.0, 4.0, 0.1, np.eye(2, dtype=np.float32))])
        for way in ("pipeline", "plain")
    }
    ways["open_clip"] = _Way([TimedLoop(error="ValueError: no")])
    ours, other = (_text_record("nllb-clip-base", "captions", way, ways) for way in ("pipeline", "open_clip"))
    assert (ours.samples, ours.unit, ours.settings["min_cosine"]) == ((2.5,), "rows/core-second", 1.0)
    assert (other.samples, other.error) == ((), "ValueError: no")


@pytest.mark.parametrize(("only", "measured"), [(None, "abc"), ("images", "b"), ("m", "a")])
def test_what_is_measured_anew(only, measured):
    cells = {"a": ("m", "text"), "b": ("m", "image"), "c": ("n", "text")}
    found = [
        name
        for name, (model, tower) in cells.items()
        if _is_of(record_of({"model": model, "tower": tower}, [1.0], unit="", settings={}), only)
    ]
    assert found == list(measured)
