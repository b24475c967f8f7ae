"""Text front end: tokenizes a whole batch at once, splits it by length, and returns unit vectors."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BabeltowerError, InputError
from runtime.preprocessing.batching import TokenBatch, inputs_of_batch, padded_batch, runs_from_lengths
from runtime.preprocessing.buckets import BucketRun, Buckets, text_buckets
from runtime.preprocessing.cleaning import n_expanded
from runtime.preprocessing.languages import code_among, flores_from_code
from runtime.preprocessing.text import Text, Tokenizer, TokenRow
from triton_models.answers import AnswerVectors, Code, Failure, Tower, failure_from_error, require_vectors
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

    async def answers(self, requests: Sequence[TextRequest]) -> list[AnswerVectors | Failure]:
        """Return one answer per request, in order."""
        jobs = [self._job(request) for request in requests]
        good = [job for job in jobs if isinstance(job, _Job)]
        rows = self._tokenizer.rows_from_texts([text for job in good for text in job.texts])
        widths = [job.width for job in good for _ in job.texts]
        vectors = await self._vectors(rows, widths)
        self._count(good, rows)
        answers: list[AnswerVectors | Failure] = []
        start = 0
        for job in jobs:
            if isinstance(job, _Job):
                end = start + len(job.texts)
                answers.append(_answer(vectors[start:end], rows[start:end]))
                start = end
            else:
                answers.append(job)
        for answer in answers:
            if isinstance(answer, Failure):
                self._counters.add("babeltower_failed_requests_total", reason=answer.reason)
        return answers

    def _job(self, request: TextRequest) -> _Job | Failure:
        try:
            limits = self._limits
            texts = text_rows(
                request.text, "text", max_bytes=limits.max_bytes, max_characters=limits.max_characters
            )
            if (n_characters := sum(map(n_expanded, texts))) > limits.max_request_characters:
                raise InputError(
                    f"The {len(texts)} texts of the request have {n_characters} characters, with ligatures "
                    f"and the like written out; the limit is {limits.max_request_characters}. Send fewer "
                    "texts in a request."
                )
            languages = _languages(request.language, len(texts))
            pairs = [Text(text, i, code) for i, (text, code) in enumerate(zip(texts, languages, strict=True))]
            for text in pairs:
                self._tokenizer.require_language(text)
                if not request.allows_blank and not text.text.strip():
                    raise InputError(
                        f"text {text.index} is empty: none of its {len(text.text)} characters is visible. "
                        "Send a text, or the request parameter blank='embed' to embed an empty one."
                    )
            return _Job(pairs, self._spec.tower.width(one_width(request.dim)))
        except BabeltowerError as error:
            return failure_from_error(error)

    async def _vectors(
        self, rows: Sequence[TokenRow], widths: Sequence[int]
    ) -> list[NDArray[np.float32] | Failure]:
        """Return a vector or failure for every row; runs are concurrent."""
        found: list[NDArray[np.float32] | Failure] = [_UNANSWERED] * len(rows)
        runs = self._runs([len(row.ids) for row in rows])
        if len(runs) == 1:
            await self._embed(runs[0], rows, widths, found)
        else:
            await asyncio.gather(*(self._embed(run, rows, widths, found) for run in runs))
        return found

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
        return [BucketRun(rows, len(rows), max(lengths[i] for i in rows)) for rows in split]

    async def _embed(
        self,
        run: BucketRun,
        rows: Sequence[TokenRow],
        widths: Sequence[int],
        found: list[NDArray[np.float32] | Failure],
    ) -> None:
        pad_id = self._spec.preprocessing.pad_id
        bucket = run.positions
        batch = padded_batch([row.ids for row in rows], bucket, pad_id=pad_id, length=run.length)
        wanted = sorted({widths[i] for i in bucket})
        try:
            by_width = await self._call(batch, run.rows, wanted)
        except BabeltowerError as error:
            failure = failure_from_error(error)
            for i in bucket:
                found[i] = failure
            return
        for at, i in enumerate(bucket):
            found[i] = by_width[widths[i]][at]
        self._counters.add("babeltower_tower_calls_total", bucket=bucket_label(run.length))
        self._counters.add("babeltower_padding_tokens_total", run.rows * run.length - batch.n_tokens)

    async def _call(
        self, batch: TokenBatch, n_rows: int, widths: Sequence[int]
    ) -> Mapping[int, NDArray[np.float32]]:
        """Run the tower on a batch, repeating its last row up to ``n_rows``; return vectors of all rows."""
        names = [self._spec.tower.outputs[str(width)] for width in widths]
        missing = ((0, n_rows - len(batch.positions)), (0, 0))
        arrays = inputs_of_batch(batch, self._spec.preprocessing.graph_inputs)
        if missing[0][1]:
            arrays = {name: np.pad(array, missing, mode="edge") for name, array in arrays.items()}
        outputs = await self._tower(arrays, names)
        return {
            width: require_vectors(output, (n_rows, width), name)
            for width, name, output in zip(widths, names, outputs, strict=True)
        }

    def _count(self, jobs: Sequence[_Job], rows: Sequence[TokenRow]) -> None:
        counters = self._counters
        counters.add("babeltower_texts_total", len(rows))
        counters.add("babeltower_tokens_total", sum(len(row.ids) for row in rows))
        counters.add("babeltower_truncated_texts_total", sum(row.truncated for row in rows))
        codes = Counter(text.language for job in jobs for text in job.texts)
        known = self._spec.preprocessing.language_ids
        for code, amount in codes.items():
            language = "none" if code is None else code_among(code, known) or flores_from_code(code)
            counters.add("babeltower_texts_by_language_total", amount, language=language)


def _gpu_buckets(spec: TextSpec, limits: TextLimits) -> Buckets:
    buckets = text_buckets(
        spec.preprocessing.context_length,
        max_rows=spec.tower.max_batch_size,
        max_tokens=limits.token_budget,
    )
    return dataclasses.replace(buckets, overhead=limits.bucket_overhead)


_UNANSWERED = Failure(Code.INTERNAL, "internal", "The text was not embedded.")


def _languages(tensor: NDArray[Any] | None, n_texts: int) -> list[str | None]:
    if tensor is None:
        return [None] * n_texts
    codes = text_rows(tensor, "language", max_bytes=4 * _LONGEST_LANGUAGE, max_characters=_LONGEST_LANGUAGE)
    return [code.strip() or None for code in codes]


def _answer(
    vectors: Sequence[NDArray[np.float32] | Failure], rows: Sequence[TokenRow]
) -> AnswerVectors | Failure:
    for vector in vectors:
        if isinstance(vector, Failure):
            return vector
    truncated = np.asarray([row.truncated for row in rows], dtype=np.bool_)
    good = [v for v in vectors if not isinstance(v, Failure)]
    # Most requests have one text, and np.stack takes ten times as long as a view.
    return AnswerVectors(good[0][np.newaxis] if len(good) == 1 else np.stack(good), truncated)
