"""In-process encoder: tokenizer, preprocessing and both towers' graphs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import device_for_engine, require_provider
from runtime.backends.backend import Backend
from runtime.counts import require_count, require_threads
from runtime.device import Device, device_from_name
from runtime.embeddings import Encoding, encoded_from_float
from runtime.encoder import Encoder, no_vectors
from runtime.errors import EngineError
from runtime.logs import LOGGER
from runtime.manifest import (
    GRAPH_ENGINES,
    Engine,
    Manifest,
    Modality,
    Precision,
    Variant,
    choice_from_value,
)
from runtime.opening.cache import PassCache, default_cache_folder
from runtime.opening.model_check import OpeningCheck
from runtime.opening.stamps import FileStamps
from runtime.opening.tower_check import Checks
from runtime.preprocessing.batching import TokenBatch, windows
from runtime.preprocessing.buckets import EXACT_ROWS, GPU_BATCH_IMAGES
from runtime.preprocessing.dropped_tokens import dropped_tokens_of
from runtime.preprocessing.image import ImageSource, decode, pixels_from_image, require_several
from runtime.preprocessing.text import Text, Tokenizer, TokenRow, texts_with_languages
from runtime.towers import GraphOpener, ImageTower, Stats, TextTower

if TYPE_CHECKING:
    pass

__all__ = ["LocalEncoder"]

_CPU_BATCH_IMAGES = 32

_WINDOW_TEXTS = 4_096
"""Texts sorted by length together; this bounds the memory, whatever the size of the corpus."""


class LocalEncoder(Encoder):
    """Encoder of a model opened in process.

    A tower's graph is opened and checked at its first use, so that embedding only texts never loads the image
    tower. ``opening`` is the check; without one, vectors are not compared with PyTorch's. ``stamps`` are
    those of the verified files, which a tower that is opened later must still have.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        variant: Variant,
        graphs: GraphOpener,
        max_pixels: int | None,
        opening: OpeningCheck | None = None,
        stamps: FileStamps | None = None,
    ) -> None:
        self.manifest = manifest
        self._tokenizer = tokenizer
        self._variant = variant
        self._graphs = graphs
        self._max_pixels = max_pixels
        self._opening = opening
        self._stamps = stamps
        self._text: TextTower | None = None
        self._image: ImageTower | None = None
        self._stats = Stats()
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def from_repository(
        cls,
        model: str | os.PathLike[str],
        *,
        engine: Engine | str | None = None,
        precision: Precision | str | None = None,
        threads: int | None = None,
        default_language: str | None = None,
        verify: bool | Checks = True,
        provider: str | None = None,
        max_pixels: int | None = None,
        instances: int = 1,
        cache: str | os.PathLike[str] | None = None,
        device: str | Device | None = None,
    ) -> LocalEncoder:
        """Open ``REPOSITORY/NAME``; arguments and errors as in ``Encoder.open``.

        Args:
            verify: ``Checks`` for callers that have verified the files, or measure models without figures;
                unlike ``False``, it logs no warning.
        """
        threads, instances = require_threads(threads), require_threads(instances, "instances") or 1
        if max_pixels is not None:
            require_count(max_pixels, "max_pixels")
        place = None if device is None else device_from_name(device)
        default = Engine.CUDA if place is not None and place.is_gpu else Engine.ONNXRUNTIME
        chosen = choice_from_value(Precision, Precision.FP32 if precision is None else precision, "Precision")
        runs_on = choice_from_value(Engine, default if engine is None else engine, "Engine")
        place = device_for_engine(runs_on, place)
        if runs_on in GRAPH_ENGINES:
            require_provider(runs_on, provider)
        manifest = Manifest.read(model)
        variant = manifest.variant(chosen, runs_on.value)
        repository = Path(model).parent
        checks = _checks(verify, os.fspath(model))
        stamps = FileStamps.of_towers(repository, variant.text, variant.image)
        if checks is Checks.ALL:
            manifest.verify(repository, variant)
        passes = PassCache(default_cache_folder() if cache is None else Path(cache))
        return cls(
            manifest,
            Tokenizer(repository / variant.tokenizer, manifest.text, default_language=default_language),
            variant,
            GraphOpener(repository, runs_on, chosen, threads, provider, instances, place),
            max_pixels,
            None
            if checks is Checks.NONE
            else OpeningCheck(repository, manifest, variant, runs_on, threads, provider, passes, place),
            stamps,
        )

    def verify_tokenizer(self) -> None:
        """Verify the checksum of the tokenizer file only.

        Raises:
            ManifestError: the file was changed, or has no checksum.
        """
        self.manifest.verify_tokenizer(self._graphs.repository, self._variant)

    @property
    def name(self) -> str:
        """Name of the model in the manifest."""
        return self.manifest.name

    @property
    def precision(self) -> Precision:
        """Precision of the opened variant."""
        return self._variant.precision

    @property
    def engine(self) -> Engine:
        """Engine that runs the towers."""
        return self._graphs.engine

    @property
    def dims(self) -> tuple[int, ...]:
        """Full width and the widths of the MRL heads, ascending."""
        return tuple(sorted({*self.manifest.mrl_dims, self.manifest.dim}))

    @property
    def fingerprint(self) -> str:
        """Fingerprint in the manifest."""
        return self.manifest.fingerprint

    @property
    def stats(self) -> Stats:
        """Counts of texts, tokens, padding and images so far."""
        return self._stats

    def iter_texts(
        self,
        texts: Iterable[str],
        language: str | Iterable[str] | None = None,
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        max_batch_tokens: int | None = None,
    ) -> Iterator[NDArray[Any]]:
        """See ``Encoder.iter_texts``."""
        pairs = texts_with_languages(texts, language)
        output, width = self._output(Modality.TEXT, dim)
        no_vectors(width, encoding)
        if max_batch_tokens is not None:
            require_count(max_batch_tokens, "max_batch_tokens")

        def parts() -> Iterator[NDArray[Any]]:
            for window in windows(pairs, _WINDOW_TEXTS):
                vectors, stats = self._text_tower().vectors_from_texts(
                    window, output=output, dim=width, max_batch_tokens=max_batch_tokens
                )
                self._count(stats)
                yield encoded_from_float(vectors, encoding)

        return parts()

    def iter_images(
        self,
        images: Iterable[ImageSource],
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        batch_size: int | None = None,
    ) -> Iterator[NDArray[Any]]:
        """See ``Encoder.iter_images``."""
        output, width = self._output(Modality.IMAGE, dim)
        no_vectors(width, encoding)
        if batch_size is not None:
            require_count(batch_size, "batch_size")
        size = batch_size or (GPU_BATCH_IMAGES if self.on_gpu else _CPU_BATCH_IMAGES)
        numbered = enumerate(require_several(images))

        def parts() -> Iterator[NDArray[Any]]:
            for first in numbered:
                batch = chain([first], islice(numbered, size - 1))
                vectors, stats = self._image_tower().vectors_from_images(batch, output=output, dim=width)
                self._count(stats)
                yield encoded_from_float(vectors, encoding)

        return parts()

    @property
    def on_gpu(self) -> bool:
        """Whether the towers run on a GPU."""
        return self._graphs.on_gpu

    @property
    def exact_rows(self) -> int | None:
        """Rows from which texts of one length run unpadded; see ``Buckets``."""
        return EXACT_ROWS if self._graphs.engine is Engine.CUDA else None

    @property
    def packs_text(self) -> bool:
        """Whether the text tower computes no padding, so that texts of several lengths share a run."""
        return self._variant.packs_text

    def token_rows(self, texts: Sequence[Text]) -> list[TokenRow]:
        """Tokenize texts, the first stage of embedding: token ids in input order; needs no graph.

        Raises:
            InputError: a text holds a lone surrogate.
            LanguageError: a language is missing, unknown, or not supported by the tower.
        """
        return self._tokenizer.rows_from_texts(texts)

    @property
    def longest_kept_text(self) -> int:
        """Length in characters above which ``shortened_text`` may cut a text."""
        return self._tokenizer.longest_kept

    def shortened_text(self, text: str) -> str:
        """Return the beginning of a long text that gives the same token row, or the text itself."""
        return self._tokenizer.shortened(text)

    def dropped_tokens(self, texts: Iterable[str]) -> list[tuple[str, ...]]:
        """Return the tokens that each text needs and the model's pruned vocabulary lacks; needs no graph.

        A text that needs none has the vector of the whole model; a model that was exported with its whole
        vocabulary drops none. The checkpoint's own tokenizer is read for this call only.

        Raises:
            InputError: an input is not a text, or holds a lone surrogate.
            ManifestError: the checkpoint's own tokenizer is missing, or cannot be read.
        """
        if not self.manifest.vocabulary:
            return [() for _ in texts_with_languages(texts, None)]
        tokenizer = self._graphs.repository / self._variant.tokenizer
        return dropped_tokens_of(tokenizer, self.manifest.text, texts)

    def vectors_from_texts(self, texts: Sequence[Text], *, dim: int | None = None) -> NDArray[np.float32]:
        """Embed texts each with its own language or none, on the calling thread.

        Returns:
            float32 (texts, dim), L2-normalised, in input order.

        Raises:
            InputError: a width that the model does not have, or a text that cannot be tokenized.
            EngineError: the text tower cannot be opened, or failed.
        """
        output, width = self._output(Modality.TEXT, dim)
        vectors, stats = self._text_tower().vectors_from_texts(
            texts, output=output, dim=width, max_batch_tokens=None
        )
        self._count(stats)
        return vectors

    def vectors_from_tokens(self, batch: TokenBatch, *, dim: int | None = None) -> NDArray[np.float32]:
        """Run the text tower on a token batch, on the calling thread; the second stage of embedding texts.

        Returns:
            float32 (rows, dim), L2-normalised, in the batch's order.

        Raises:
            InputError: a width that the model does not have.
            EngineError: the text tower cannot be opened, or failed.
        """
        output, width = self._output(Modality.TEXT, dim)
        return self._text_tower().vectors_from_batch(batch, output=output, dim=width)

    def vectors_from_pixels(
        self, pixels: NDArray[np.uint8], *, dim: int | None = None
    ) -> NDArray[np.float32]:
        """Run the image tower on pixels; the second stage, after ``runtime.preprocessing.image``.

        Args:
            pixels: uint8 (images, 3, height, width).

        Returns:
            float32 (images, dim), L2-normalised.

        Raises:
            InputError: a width that the model does not have.
            EngineError: the image tower cannot be opened, or failed.
        """
        output, width = self._output(Modality.IMAGE, dim)
        return self._image_tower().vectors_from_pixels(pixels, output=output, dim=width)

    def checked_image(self, source: ImageSource, *, name: str | None = None) -> ImageSource:
        """See ``Encoder.checked_image``; preprocessing leaves the returned image unchanged."""
        image = decode(source, name=name, max_pixels=self._max_pixels)
        return pixels_from_image(image, self.manifest.image).transpose(1, 2, 0)

    def open_tower(self, modality: Modality) -> None:
        """Open and check a tower now instead of at its first use.

        Raises:
            EngineError: see ``Encoder.open``.
            OpeningCheckError: its vectors differ from PyTorch's on this machine.
        """
        if modality is Modality.TEXT:
            self._text_tower()
        else:
            self._image_tower()

    def release_tower(self, modality: Modality) -> None:
        """Give back a tower's memory, with the text tower also the tokenizer's, until its next use.

        Wait for its running calls first: no lock holds them.
        """
        tower: TextTower | ImageTower | None
        with self._lock:
            if modality is Modality.TEXT:
                tower, self._text = self._text, None
                self._tokenizer.release()
            else:
                tower, self._image = self._image, None
        if tower is not None:
            tower.close()

    def is_tower_open(self, modality: Modality) -> bool:
        """Return True if a tower is in memory."""
        return (self._text if modality is Modality.TEXT else self._image) is not None

    def close(self) -> None:
        """Release both graphs; embedding afterwards raises an EngineError."""
        with self._lock:
            self._closed = True
            for tower in (self._text, self._image):
                if tower is not None:
                    tower.close()

    def _text_tower(self) -> TextTower:
        with self._lock:
            self._require_open()
            if self._text is None:
                backend = self._opened(Modality.TEXT)
                text = self.manifest.text
                self._text = TextTower(
                    self._tokenizer,
                    backend,
                    text.pad_id,
                    self._graphs.run_overhead,
                    text.context_length if self.on_gpu else None,
                    self.exact_rows,
                    self.packs_text,
                    text.graph_inputs,
                )
            return self._text

    def _image_tower(self) -> ImageTower:
        with self._lock:
            self._require_open()
            if self._image is None:
                backend = self._opened(Modality.IMAGE)
                decoders = ThreadPoolExecutor(self._graphs.n_threads, "babeltower-decode")
                self._image = ImageTower(self.manifest.image, backend, decoders, self._max_pixels)
            return self._image

    def _opened(self, modality: Modality) -> Backend:
        """Open a tower's graph and run its opening check."""
        if self._stamps is not None:
            self._stamps.require_unchanged()
        backend = self._graphs.open(self._variant.tower(modality))
        if self._opening is not None:
            try:
                self._opening.require(modality, backend)
            except BaseException:
                backend.close()
                raise
        return backend

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError(
                f"The encoder of {self.manifest.name} is closed. Open it again with Encoder.open."
            )

    def _count(self, stats: Stats) -> None:
        with self._lock:
            self._stats += stats

    def _output(self, modality: Modality, dim: int | None) -> tuple[str, int]:
        """Return the name and width of the output for a requested width."""
        outputs = self._variant.tower(modality).outputs
        width = self.require_width(dim)
        return outputs[str(width)], width


_unverified: set[str] = set()
"""Models for which the warning about missing checks was already logged."""


def _checks(verify: bool | Checks, model: str) -> Checks:
    """Convert ``verify`` to checks; ``False`` logs a warning once per model."""
    if isinstance(verify, Checks):
        return verify
    if not verify and model not in _unverified:
        _unverified.add(model)
        LOGGER.warning(
            "%s is opened with verify=False: its files are not compared with their checksums, nor its "
            "vectors on this machine with PyTorch's.",
            model,
        )
    return Checks.ALL if verify else Checks.NONE
