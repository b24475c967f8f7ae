"""Packed texts beside padded ones: ragged batches, and a window of captions as a corpus is run.

A ragged batch in one shape says what the padding in it costs. The corpus decides: there, texts are sorted by
length, so that padded runs have little padding, and packed runs a new number of tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu.clocks import Contender
from bench.gpu.forms import TIMED_CONTEXT_LENGTH, TimedForm
from bench.gpu.sessions import TimedSession
from bench.gpu.towers import TimedShape, TimedTower
from runtime.preprocessing.buckets import EXACT_ROWS, text_buckets

__all__ = ["RAGGED_SHAPES", "caption_lengths", "captions_contender"]

RAGGED_SHAPES = tuple(
    TimedShape(rows, tokens, ragged=True) for rows, tokens in ((512, 16), (512, 32), (32, 64))
)
"""Ragged batches that are timed for the padded and the packed form alone."""

_N_CAPTIONS = 4_096
_FEWEST, _GAMMA = 3, (4.0, 3.5)
_N_THREADS = 2
"""Runs under way at once, as in a corpus: one is copied while another is computed."""


def caption_lengths(n: int = _N_CAPTIONS) -> NDArray[np.int64]:
    """Return lengths as those of captions in many languages: 17 tokens in the mean, 77 at most."""
    random = np.random.default_rng(0)
    lengths: NDArray[np.int64] = _FEWEST + random.gamma(*_GAMMA, n).astype(np.int64)
    return np.minimum(lengths, TIMED_CONTEXT_LENGTH)


def captions_contender(
    tower: TimedTower, form: TimedForm, session: TimedSession, lengths: NDArray[np.int64]
) -> Contender:
    """Return the run of all captions by the product's backend, dealt out as a corpus is."""
    runs = list(_inputs_of_runs(tower, lengths, packed=form.packed))
    from_host = partial(_embedded, session.run_from_host, runs)
    detail = {"runs": len(runs), "padded_tokens": int(sum(run["input_ids"].size for run in runs))}
    return Contender(
        form.by, session.engine, form.precision.value, from_host, from_host, detail, metrics=("wall",)
    )


def _embedded(
    run: Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]], runs: Sequence[Mapping[str, NDArray[Any]]]
) -> NDArray[Any]:
    with ThreadPoolExecutor(_N_THREADS) as pool:
        return np.concatenate(list(pool.map(run, runs)))


def _inputs_of_runs(
    tower: TimedTower, lengths: NDArray[np.int64], *, packed: bool
) -> Iterator[dict[str, NDArray[Any]]]:
    random = np.random.default_rng(1)
    for run in text_buckets(TIMED_CONTEXT_LENGTH, exact_rows=EXACT_ROWS, packed=packed).runs(lengths):
        own = lengths[run.positions]
        ids = random.integers(3, tower.vocabulary, (len(own), run.length))
        mask = (np.arange(run.length) < own[:, None]).astype(np.int64)
        yield {"input_ids": np.where(mask == 1, ids, 1), "attention_mask": mask}
