"""Text front end: tokenizes a whole batch at once, splits it by length, and returns unit vectors."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BabeltowerError, InputError
from runtime.preprocessing.batching import inputs_of_batch, padded_batch, runs_from_lengths
from runtime.preprocessing.buckets import BucketRun, Buckets, text_buckets
from runtime.preprocessing.cleaning import MOST_EXPANDED, n_expanded
from runtime.preprocessing.languages import code_among, flores_from_code
from runtime.preprocessing.text import Text, Tokenizer, TokenRow
from triton_models.answers import (
    AnswerVectors,
    Failure,
    Tower,
    TowerError,
    TowerRun,
    failure_from_error,
    require_vectors,
)
from triton_models.counters import Counters, bucket_label
from triton_models.spec import TextLimits, TextSpec
from triton_models.tensors import one_width, text_rows

__all__ = ["TextFrontEnd", "TextRequest"]

_LONGEST_LANGUAGE = 64
"""Maximum characters of a language code; the longest known one has fewer than 20."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Tensors of one request, as received from Triton.

    Attributes:
        text: bytes (rows, 1).
        language: bytes (rows, 1), FLORES-200 or BCP-47 codes; empty for none.
        dim: int32 (rows, 1).
        allows_blank: Embed blank texts, as in process, instead of rejecting them as likely mistakes.
    """

    text: NDArray[Any]
    language: NDArray[Any] | None = None
    dim: NDArray[Any] | None = None
    allows_blank: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    """Valid request: its texts with their positions, and its vector width."""

    texts: list[Text]
    width: int


@dataclass(frozen=True, slots=True)
class _Embedded:
    """Vectors of a batch's rows by width, and failures by row; the other rows of a width are not filled."""

    vectors: Mapping[int, NDArray[np.float32]]
    failures: dict[int, Failure]

    def answer(
        self, start: int, end: int, width: int, truncated: NDArray[np.bool_]
    ) -> AnswerVectors | Failure:
        """Return the rows of one request, or its first failure."""
        if self.failures:
            for row in range(start, end):
                if row in self.failures:
                    return self.failures[row]
        return AnswerVectors(self.vectors[width][start:end], truncated[start:end])


class TextFrontEnd:
    """Text front end for batches of requests; each request succeeds or fails independently.

    For a tower on a GPU, runs are padded to one of a few shapes, so that Triton can join those of several
    front ends, and its backend has a CUDA graph for them.
    """

    def __init__(
        self, spec: TextSpec, limits: TextLimits, tokenizer: Tokenizer, tower: Tower, counters: Counters
    ) -> None:
        self._spec = spec
        self._limits = limits
        self._tokenizer = tokenizer
        self._tower = tower
        self._counters = counters
        self._buckets = _gpu_buckets(spec, limits) if spec.tower.on_gpu else None

    def answers(self, requests: Sequence[TextRequest]) -> list[AnswerVectors | Failure]:
        """Return one answer per request, in order."""
        jobs = [self._job(request) for request in requests]
        good = [job for job in jobs if isinstance(job, _Job)]
        rows = self._tokenizer.rows_from_texts([text for job in good for text in job.texts])
        embedded = self._embedded(rows, [job.width for job in good for _ in job.texts])
        self._count(good, rows)
        truncated = np.array([row.truncated for row in rows], dtype=np.bool_)
        answers: list[AnswerVectors | Failure] = []
        start = 0
        for job in jobs:
            answer: AnswerVectors | Failure
            if isinstance(job, _Job):
                end = start + len(job.texts)
                answer = embedded.answer(start, end, job.width, truncated)
                start = end
            else:
                answer = job
            if isinstance(answer, Failure):
                self._counters.add("babeltower_failed_requests_total", reason=answer.reason)
            answers.append(answer)
        return answers

    def _job(self, request: TextRequest) -> _Job | Failure:
        try:
            limits = self._limits
            texts = text_rows(
                request.text, "text", max_bytes=limits.max_bytes, max_characters=limits.max_characters
            )
            _require_tokenizable(texts, limits.max_request_characters)
            languages = _languages(request.language, len(texts))
            pairs = []
            for i, (text, code) in enumerate(zip(texts, languages, strict=True)):
                pairs.append(pair := Text(text, i, code))
                self._tokenizer.require_language(pair)
                if not request.allows_blank and not text.strip():
                    raise InputError(
                        f"text {i} is empty: none of its {len(text)} characters is visible. "
                        "Send a text, or the request parameter blank='embed' to embed an empty one."
                    )
            return _Job(pairs, self._spec.tower.width(one_width(request.dim)))
        except BabeltowerError as error:
            return failure_from_error(error)

    def _embedded(self, rows: Sequence[TokenRow], widths: Sequence[int]) -> _Embedded:
        """Return the vectors and failures of all rows; runs are in flight together."""
        wanted = sorted(set(widths))
        embedded = _Embedded({width: np.empty((len(rows), width), dtype=np.float32) for width in wanted}, {})
        ids = [row.ids for row in rows]
        lengths = [len(row) for row in ids]
        runs = self._runs(lengths)
        in_runs = [_in_run(run, widths, wanted) for run in runs]
        calls = [self._call(run, ids, in_run) for run, in_run in zip(runs, in_runs, strict=True)]
        n_padding = 0
        for run, in_run, outcome in zip(runs, in_runs, self._tower(calls), strict=True):
            try:
                self._keep(run, in_run, outcome, embedded)
            except TowerError as error:
                embedded.failures.update(dict.fromkeys(run.positions.tolist(), failure_from_error(error)))
                continue
            n_padding += run.rows * run.length - sum([lengths[i] for i in run.positions.tolist()])
            self._counters.add("babeltower_tower_calls_total", bucket=bucket_label(run.length))
        self._counters.add("babeltower_padding_tokens_total", n_padding)
        return embedded

    def _runs(self, lengths: Sequence[int]) -> list[BucketRun]:
        """Split rows into runs of the tower, each with the shape that it is padded to."""
        if self._buckets is not None:
            return self._buckets.runs(lengths)
        split = runs_from_lengths(
            lengths,
            max_tokens=self._limits.token_budget,
            max_rows=self._spec.tower.max_batch_size,
            overhead=self._limits.bucket_overhead,
        )
        return [BucketRun(rows, len(rows), lengths[rows[0]]) for rows in split]  # longest rows come first

    def _call(self, run: BucketRun, ids: Sequence[list[int]], widths: Sequence[int]) -> TowerRun:
        """Return a run's call of the tower, repeating its last row up to the run's number of rows."""
        batch = padded_batch(ids, run.positions, pad_id=self._spec.preprocessing.pad_id, length=run.length)
        arrays = inputs_of_batch(batch, self._spec.preprocessing.graph_inputs)
        if n_missing := run.rows - len(run.positions):
            missing = ((0, n_missing), (0, 0))
            arrays = {name: np.pad(array, missing, mode="edge") for name, array in arrays.items()}
        return TowerRun(arrays, [self._spec.tower.outputs[str(width)] for width in widths])

    def _keep(
        self,
        run: BucketRun,
        widths: Sequence[int],
        outcome: list[NDArray[Any]] | TowerError,
        embedded: _Embedded,
    ) -> None:
        """Put the vectors of a run in their rows' places; raise the error of one that has none."""
        if isinstance(outcome, TowerError):
            raise outcome
        for width, output in zip(widths, outcome, strict=True):
            vectors = require_vectors(output, (run.rows, width), self._spec.tower.outputs[str(width)])
            embedded.vectors[width][run.positions] = vectors[: len(run.positions)]

    def _count(self, jobs: Sequence[_Job], rows: Sequence[TokenRow]) -> None:
        counters = self._counters
        counters.add("babeltower_texts_total", len(rows))
        counters.add("babeltower_tokens_total", sum([len(row.ids) for row in rows]))
        counters.add("babeltower_truncated_texts_total", sum([row.truncated for row in rows]))
        known = self._spec.preprocessing.language_ids
        by_language: Counter[str] = Counter()
        for code, amount in Counter([text.language for job in jobs for text in job.texts]).items():
            language = "none" if code is None else code_among(code, known) or flores_from_code(code)
            by_language[language] += amount
        counters.add_each("babeltower_texts_by_language_total", "language", by_language)


def _in_run(run: BucketRun, widths: Sequence[int], wanted: Sequence[int]) -> Sequence[int]:
    """Return the widths that the rows of a run need, ascending; nearly always there is only one."""
    return wanted if len(wanted) == 1 else sorted({widths[i] for i in run.positions.tolist()})


def _gpu_buckets(spec: TextSpec, limits: TextLimits) -> Buckets:
    buckets = text_buckets(
        spec.preprocessing.context_length,
        max_rows=spec.tower.max_batch_size,
        max_tokens=limits.token_budget,
    )
    return dataclasses.replace(buckets, overhead=limits.bucket_overhead)


def _require_tokenizable(texts: Sequence[str], limit: int) -> None:
    """Check the characters of a request; few texts are so long that they must be counted."""
    if MOST_EXPANDED * sum(map(len, texts)) <= limit:
        return
    if (n_characters := sum(map(n_expanded, texts))) > limit:
        raise InputError(
            f"The {len(texts)} texts of the request have {n_characters} characters, with ligatures "
            f"and the like written out; the limit is {limit}. Send fewer "
            "texts in a request."
        )


def _languages(tensor: NDArray[Any] | None, n_texts: int) -> list[str | None]:
    if tensor is None:
        return [None] * n_texts
    codes = text_rows(tensor, "language", max_bytes=4 * _LONGEST_LANGUAGE, max_characters=_LONGEST_LANGUAGE)
    return [code.strip() or None for code in codes]
