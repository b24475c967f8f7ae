"""Text and image towers: preprocessing and graph, from the caller's inputs to unit vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import device_for_engine, open_backend
from runtime.backends.backend import Backend
from runtime.backends.plan_checks import require_plan_of_tower
from runtime.device import Device
from runtime.errors import EngineError, ImageError
from runtime.machine import n_cores
from runtime.manifest import Engine, ImagePreprocessing, Precision, TowerFiles
from runtime.preprocessing.batching import (
    CPU_BATCH_TOKENS,
    RUN_OVERHEAD,
    TokenBatch,
    batches_from_rows,
    inputs_of_batch,
    padded_batch,
)
from runtime.preprocessing.buckets import GPU_BATCH_TOKENS, text_buckets
from runtime.preprocessing.image import ImageSource, Snapshot, decode, pixels_from_image, snapshot_from_source
from runtime.preprocessing.text import Text, Tokenizer

__all__ = ["GraphOpener", "ImageTower", "Stats", "TextTower"]


_COPIES_AHEAD = 16
"""Maximum number of images waiting to be decoded, to bound the memory of copied images."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of an encoder's work so far; ``tokens`` includes special tokens but no padding."""

    texts: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    truncated_texts: int = 0
    images: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            texts=self.texts + other.texts,
            tokens=self.tokens + other.tokens,
            padding_tokens=self.padding_tokens + other.padding_tokens,
            truncated_texts=self.truncated_texts + other.truncated_texts,
            images=self.images + other.images,
        )


@dataclass(frozen=True, slots=True)
class GraphOpener:
    """Location of the graphs, and the engine settings to open them with."""

    repository: Path
    engine: Engine
    precision: Precision
    threads: int | None
    provider: str | None
    instances: int = 1
    device: Device | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the graphs run on a GPU."""
        return device_for_engine(self.engine, self.device).is_gpu

    @property
    def n_threads(self) -> int:
        """Threads for work outside the engine."""
        return self.threads or n_cores()

    @property
    def run_overhead(self) -> int | None:
        """Fixed cost of a text tower's run, in tokens; ``None`` on a device where it is unknown."""
        return RUN_OVERHEAD if "CPU" in (self.provider or "CPU") else None

    def open(self, tower: TowerFiles) -> Backend:
        """Open a tower's graph.

        Raises:
            EngineError: see ``open_backend``; also if a plan was built from another graph.
        """
        if self.engine is Engine.TENSORRT:
            require_plan_of_tower(self.repository, tower)
        backend = open_backend(
            self.engine,
            self.repository / tower.model / str(tower.version) / tower.graph,
            precision=self.precision,
            threads=self.threads,
            provider=self.provider,
            instances=self.instances,
            device=self.device,
        )
        return _InParts(backend, tower.max_batch_size) if self.engine is Engine.TENSORRT else backend


@dataclass(frozen=True, slots=True)
class _InParts:
    """Backend with a row limit: larger batches are split, without effect on the results."""

    backend: Backend
    max_rows: int

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs of all rows."""
        n_rows = len(next(iter(inputs.values())))
        parts = [
            self.backend.run(
                {name: array[at : at + self.max_rows] for name, array in inputs.items()}, outputs
            )
            for at in range(0, max(1, n_rows), self.max_rows)
        ]
        return (
            parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
        )

    def close(self) -> None:
        """Release the backend."""
        self.backend.close()


@dataclass(frozen=True, slots=True)
class TextTower:
    """Tokenizer and graph of the text tower.

    Attributes:
        run_overhead: Fixed cost of a run, in tokens; without one, runs are filled to their budget.
        context_length: Longest text, in tokens; on a GPU, where runs have the shapes of buckets.
        exact_rows: See ``Buckets``; for an engine on a GPU that runs any shape.
        packed: See ``Buckets``; for a graph on a GPU that packs its texts.
        inputs: Names of the graph's inputs.
    """

    tokenizer: Tokenizer
    backend: Backend
    pad_id: int
    run_overhead: int | None = RUN_OVERHEAD
    context_length: int | None = None
    exact_rows: int | None = None
    packed: bool = False
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")

    def close(self) -> None:
        """Release the graph."""
        self.backend.close()

    def vectors_from_texts(
        self, texts: Sequence[Text], *, output: str, dim: int, max_batch_tokens: int | None
    ) -> tuple[NDArray[np.float32], Stats]:
        """Embed one window of texts.

        Args:
            output: Name of the graph's output of width ``dim``.
            max_batch_tokens: Maximum rows × padded length of a run; ``None`` for the device's own.

        Returns:
            float32 (texts, dim) in input order, L2-normalised, and the counts.

        Raises:
            InputError: a text cannot be tokenized; nothing of the window is embedded then.
            EngineError: the graph failed, or returned numbers that are not finite.
        """
        rows = self.tokenizer.rows_from_texts(texts)
        vectors = np.empty((len(rows), dim), dtype=np.float32)
        n_tokens = n_padding_tokens = 0
        for batch in self._batches([row.ids for row in rows], max_batch_tokens):
            vectors[batch.positions] = self.vectors_from_batch(batch, output=output, dim=dim)
            n_tokens += batch.n_tokens
            n_padding_tokens += batch.n_padding_tokens
        return vectors, Stats(
            texts=len(rows),
            tokens=n_tokens,
            padding_tokens=n_padding_tokens,
            truncated_texts=sum(row.truncated for row in rows),
        )

    def _batches(self, ids: Sequence[Sequence[int]], max_batch_tokens: int | None) -> Iterable[TokenBatch]:
        if self.context_length is not None:
            buckets = text_buckets(
                self.context_length,
                max_tokens=max_batch_tokens or GPU_BATCH_TOKENS,
                exact_rows=self.exact_rows,
                packed=self.packed,
            )
            for run in buckets.runs([len(row) for row in ids]):
                yield padded_batch(ids, run.positions, pad_id=self.pad_id, length=run.length)
            return
        budget = max_batch_tokens or CPU_BATCH_TOKENS
        overhead = budget if self.run_overhead is None else self.run_overhead
        yield from batches_from_rows(ids, pad_id=self.pad_id, max_batch_tokens=budget, overhead=overhead)

    def vectors_from_batch(self, batch: TokenBatch, *, output: str, dim: int) -> NDArray[np.float32]:
        """Embed one padded batch: float32 (rows, dim), in the batch's order."""
        return _vectors(self.backend, inputs_of_batch(batch, self.inputs), output, dim)


@dataclass(frozen=True, slots=True)
class ImageTower:
    """Preprocessing and graph of the image tower; images are decoded on a pool of threads.

    A caller's images are copied one by one on the calling thread, so that no object of the caller is used by
    two threads, or after the caller has moved on to the next image.
    """

    preprocessing: ImagePreprocessing
    backend: Backend
    decoders: ThreadPoolExecutor
    max_pixels: int | None

    def close(self) -> None:
        """Release the graph and the decoding threads."""
        self.decoders.shutdown(wait=False)
        self.backend.close()

    def vectors_from_images(
        self, images: Iterable[tuple[int, ImageSource]], *, output: str, dim: int
    ) -> tuple[NDArray[np.float32], Stats]:
        """Embed one batch of numbered images.

        Returns:
            float32 (images, dim) in input order, L2-normalised, and the counts.

        Raises:
            ImageError: an image cannot be decoded; nothing of the batch is embedded then.
            EngineError: the graph failed, or returned numbers that are not finite.
        """
        pixels = np.stack(self._decoded(images))
        return self.vectors_from_pixels(pixels, output=output, dim=dim), Stats(images=len(pixels))

    def vectors_from_pixels(self, pixels: NDArray[np.uint8], *, output: str, dim: int) -> NDArray[np.float32]:
        """Embed uint8 (images, 3, height, width): float32 (images, dim)."""
        return _vectors(self.backend, {"pixels": pixels}, output, dim)

    def _decoded(self, images: Iterable[tuple[int, ImageSource]]) -> list[NDArray[np.uint8]]:
        decoding: list[Future[NDArray[np.uint8]]] = []
        try:
            for number, source in images:
                if len(decoding) >= _COPIES_AHEAD:
                    wait([decoding[-_COPIES_AHEAD]])
                decoding.append(self._taken(number, source))
            return [pixels.result() for pixels in decoding]
        finally:
            for pixels in decoding:
                pixels.cancel()

    def _taken(self, number: int, source: ImageSource) -> Future[NDArray[np.uint8]]:
        """Copy and decode an image; errors go into the future, so that a batch's first bad image is named."""
        try:
            snapshot = snapshot_from_source(source, name=_name(number, source), max_pixels=self.max_pixels)
        except ImageError as error:
            failed: Future[NDArray[np.uint8]] = Future()
            failed.set_exception(error)
            return failed
        return self.decoders.submit(self._pixels, snapshot)

    def _pixels(self, snapshot: Snapshot) -> NDArray[np.uint8]:
        return pixels_from_image(decode(snapshot, max_pixels=self.max_pixels), self.preprocessing)


def _name(number: int, source: ImageSource) -> str | None:
    """Return an image's name in errors: ``None`` for its path, otherwise its position in the batch."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        n_bytes = source.nbytes if isinstance(source, memoryview) else len(source)
        return f"{number} of the batch, {n_bytes} bytes,"
    if isinstance(source, str) or hasattr(source, "__fspath__"):
        return None
    return f"{number} of the batch"


def _vectors(
    backend: Backend, inputs: Mapping[str, NDArray[Any]], output: str, dim: int
) -> NDArray[np.float32]:
    (vectors,) = backend.run(inputs, [output])
    n_rows = len(next(iter(inputs.values())))
    if vectors.shape != (n_rows, dim):
        raise EngineError(
            f"Output {output!r} has shape {vectors.shape}; the manifest says {(n_rows, dim)}. The graph does "
            "not match the manifest: export the checkpoint again."
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise EngineError(
            f"Output {output!r} is not finite in {n_rows - int(finite.sum())} of {n_rows} rows: the "
            "precision overflows in this tower. Open the model in another precision."
        )
    return vectors.astype(np.float32, copy=False)
