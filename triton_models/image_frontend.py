"""Image front end: decodes images on a thread pool with the runtime's code, and returns unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BabeltowerError
from runtime.preprocessing.batching import windows
from runtime.preprocessing.buckets import image_buckets
from runtime.preprocessing.image import DecodingCost, pixels_from_file
from runtime.preprocessing.image_work import DecodingMemory, costs_of_files, name_of_row
from triton_models.answers import (
    AnswerVectors,
    Code,
    Failure,
    Tower,
    TowerError,
    TowerRun,
    failure_from_error,
    require_vectors,
)
from triton_models.counters import Counters
from triton_models.spec import ImageLimits, ImageSpec
from triton_models.tensors import bytes_rows, one_width

__all__ = ["ImageFrontEnd", "ImageRequest"]


_LONG_WORK = 1 << 20
"""Pixels of work from which it is worthwhile to ask whether the sender is still there."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """Tensors of one request.

    Attributes:
        image: bytes (rows, 1).
        dim: int32 (rows, 1).
        is_cancelled: Tells whether the sender has left.
    """

    image: NDArray[Any]
    dim: NDArray[Any] | None = None
    is_cancelled: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Valid request whose images are being decoded, and its vector width."""

    images: list[Future[NDArray[np.uint8] | Failure]]
    width: int


@dataclass(frozen=True, slots=True)
class _Job:
    pixels: list[NDArray[np.uint8]]
    width: int


class ImageFrontEnd:
    """Image front end for batches of requests; each request succeeds or fails independently."""

    def __init__(self, spec: ImageSpec, limits: ImageLimits, tower: Tower, counters: Counters) -> None:
        self._spec = spec
        self._limits = limits
        self._tower = tower
        self._counters = counters
        self._buckets = image_buckets(max_rows=spec.tower.max_batch_size) if spec.tower.on_gpu else None
        self._memory = DecodingMemory(limits.max_memory_bytes)
        self._decoders = ThreadPoolExecutor(limits.decode_threads, "babeltower-decode")

    def close(self) -> None:
        """Stop the decoding threads."""
        self._decoders.shutdown(wait=False)

    def answers(self, requests: Sequence[ImageRequest]) -> list[AnswerVectors | Failure]:
        """Return one answer per request, in order."""
        jobs = [_job(decoding) for decoding in [self._decoding(request) for request in requests]]
        good = [job for job in jobs if isinstance(job, _Job)]
        pixels = [image for job in good for image in job.pixels]
        widths = sorted({job.width for job in good})
        runs = list(self._runs(len(pixels)))
        parts = self._embedded([[pixels[i] for i in run] for run in runs], widths)
        found = [vectors for run, part in zip(runs, parts, strict=True) for vectors in _rows(part, len(run))]
        answers: list[AnswerVectors | Failure] = []
        start = 0
        for job in jobs:
            if isinstance(job, _Job):
                end = start + len(job.pixels)
                answers.append(_answer(found[start:end], job.width))
                start = end
            else:
                answers.append(job)
        self._count(answers)
        return answers

    def _runs(self, n_images: int) -> Iterator[list[int]]:
        """Split images into runs of the tower, in order."""
        if self._buckets is None:
            yield from windows(range(n_images), self._spec.tower.max_batch_size)
        else:
            for run in self._buckets.runs([1] * n_images):
                yield run.positions.tolist()

    def _decoding(self, request: ImageRequest) -> _Decoding | Failure:
        try:
            width = self._spec.tower.width(one_width(request.dim))
            files = bytes_rows(request.image, "image")
            limits = self._limits
            costs = costs_of_files(
                files,
                self._spec.preprocessing,
                max_bytes=limits.max_bytes,
                max_pixels=limits.max_pixels,
                max_memory_bytes=limits.max_memory_bytes,
            )
            decoding = [
                self._decoders.submit(self._pixels, i, file, cost, request.is_cancelled)
                for i, (file, cost) in enumerate(zip(files, costs, strict=True))
            ]
            return _Decoding(decoding, width)
        except BabeltowerError as error:
            return failure_from_error(error)

    def _pixels(
        self, number: int, file: bytes, cost: DecodingCost, is_cancelled: Callable[[], bool]
    ) -> NDArray[np.uint8] | Failure:
        """Preprocess an image; errors are converted here, since their tracebacks would hold its bytes."""
        try:
            with self._memory.taken(cost.n_bytes):
                if cost.n_pixels > _LONG_WORK and is_cancelled():
                    return _CANCELLED
                return pixels_from_file(
                    file,
                    self._spec.preprocessing,
                    cost,
                    name=name_of_row(number, file),
                    max_pixels=self._limits.max_pixels,
                )
        except BabeltowerError as error:
            return failure_from_error(error)

    def _embedded(
        self, runs: Sequence[Sequence[NDArray[np.uint8]]], widths: Sequence[int]
    ) -> list[dict[int, NDArray[np.float32]] | Failure]:
        """Run the tower; on a GPU, the last image of a run is repeated to fill one of its shapes."""
        names = [self._spec.tower.outputs[str(width)] for width in widths]
        padded = [self._padded(run) for run in runs]
        outcomes = self._tower([TowerRun({"pixels": pixels}, names) for pixels in padded])
        return [
            _vectors(outcome, len(pixels), widths, names)
            for outcome, pixels in zip(outcomes, padded, strict=True)
        ]

    def _padded(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        n_rows = len(pixels) if self._buckets is None else self._buckets.shape_of(len(pixels))[0]
        return np.stack([*pixels, *([pixels[-1]] * (n_rows - len(pixels)))])

    def _count(self, answers: Sequence[AnswerVectors | Failure]) -> None:
        for answer in answers:
            if isinstance(answer, AnswerVectors):
                self._counters.add("babeltower_images_total", len(answer.vectors))
            else:
                self._counters.add("babeltower_failed_requests_total", reason=answer.reason)
                if answer.reason == "image":
                    self._counters.add("babeltower_decode_failures_total")


_CANCELLED = Failure(Code.CANCELLED, "cancelled", "The request was cancelled by its sender.")


def _job(decoding: _Decoding | Failure) -> _Job | Failure:
    """Wait for a request's images."""
    if isinstance(decoding, Failure):
        return decoding
    decoded = [image.result() for image in decoding.images]
    failed = next((outcome for outcome in decoded if isinstance(outcome, Failure)), None)
    if failed is not None:
        return failed
    return _Job([outcome for outcome in decoded if not isinstance(outcome, Failure)], decoding.width)


def _vectors(
    outcome: list[NDArray[Any]] | TowerError, n_rows: int, widths: Sequence[int], names: Sequence[str]
) -> dict[int, NDArray[np.float32]] | Failure:
    """Return the vectors of a run by width, or its failure."""
    try:
        if isinstance(outcome, TowerError):
            raise outcome
        return {
            width: require_vectors(output, (n_rows, width), name)
            for width, name, output in zip(widths, names, outcome, strict=True)
        }
    except TowerError as error:
        return failure_from_error(error)


def _rows(
    part: dict[int, NDArray[np.float32]] | Failure, n_rows: int
) -> list[dict[int, NDArray[np.float32]] | Failure]:
    if isinstance(part, Failure):
        return [part] * n_rows
    return [{width: vectors[i] for width, vectors in part.items()} for i in range(n_rows)]


def _answer(rows: Sequence[dict[int, NDArray[np.float32]] | Failure], width: int) -> AnswerVectors | Failure:
    vectors = []
    for row in rows:
        if isinstance(row, Failure):
            return row
        vectors.append(row[width])
    return AnswerVectors(np.stack(vectors))
