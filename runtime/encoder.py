"""The encoder: a model's texts and images as vectors of one space."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Engine
from runtime.batching import TokenBatch, windows
from runtime.embeddings import Encoding, encoded_from_float
from runtime.errors import EngineError, InputError
from runtime.image import ImageSource, require_several
from runtime.manifest import Manifest, Modality, Precision, Variant
from runtime.text import Text, Tokenizer, TokenRow, texts_with_languages
from runtime.towers import GraphOpener, ImageTower, Stats, TextTower

__all__ = ["Encoder"]

Choice = TypeVar("Choice", bound=Enum)

DEFAULT_MAX_BATCH_TOKENS = 2_048
_WINDOW_TEXTS = 4_096
"""Texts that are sorted by length together; memory is bounded by this, not by the corpus."""


class Encoder:
    """A model opened for inference; safe to use from several threads.

    A tower's graph is opened at its first use, so that who embeds only texts never loads the image tower.
    Use it as a context manager, or call ``close``.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        variant: Variant,
        graphs: GraphOpener,
        max_pixels: int | None,
    ) -> None:
        self.manifest = manifest
        self._tokenizer = tokenizer
        self._variant = variant
        self._graphs = graphs
        self._max_pixels = max_pixels
        self._text: TextTower | None = None
        self._image: ImageTower | None = None
        self._stats = Stats()
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        engine: Engine | str = Engine.ONNXRUNTIME,
        precision: Precision | str = Precision.FP32,
        threads: int | None = None,
        default_language: str | None = None,
        verify: bool = True,
        provider: str | None = None,
        max_pixels: int | None = None,
        instances: int = 1,
    ) -> Encoder:
        """Open ``REPOSITORY/NAME``.

        Args:
            model: Path of the model: a repository's folder and the name of a manifest in it.
            engine: ``onnxruntime``, ``openvino`` or ``tensorrt``.
            precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``, if the model was exported in it
                and measured on that engine.
            threads: Threads of one run; ``None`` takes every physical core.
            default_language: Language of the texts that name none.
            verify: Compare every file with its recorded sha256 first.
            provider: ONNX Runtime's execution provider or OpenVINO's device; the CPU by default.
            max_pixels: Width × height above which an image is refused; Pillow's limit by default.
            instances: Runs that may go on at once, on ``threads`` threads each, when several threads embed.

        Raises:
            ManifestError: there is no such model or precision, or a file does not fit its manifest.
            EngineError: an unknown engine or precision, or an address. A graph is opened at the tower's
                first use: what the engine refuses is raised there.
            LanguageError: the default language is unknown, or not spoken by the tower.
        """
        address = os.fspath(model)
        if "://" in address:
            raise EngineError(
                f"{address} is an address; this build of babeltower runs models in process. Pass the path "
                "REPOSITORY/NAME of an exported model."
            )
        chosen, runs_on = _choice(Precision, precision, "Precision"), _choice(Engine, engine, "Engine")
        manifest = Manifest.read(address)
        variant = manifest.variant(chosen, runs_on.value)
        repository = Path(address).parent
        if verify:
            manifest.verify(repository, variant)
        return cls(
            manifest,
            Tokenizer(repository / variant.tokenizer, manifest.text, default_language=default_language),
            variant,
            GraphOpener(repository, runs_on, chosen, threads, provider, instances),
            max_pixels,
        )

    @property
    def dim(self) -> int:
        """Full width of a vector."""
        return self.manifest.dim

    @property
    def dims(self) -> tuple[int, ...]:
        """Every width that can be asked for, ascending; the last is ``dim``."""
        return tuple(sorted({*self.manifest.mrl_dims, self.manifest.dim}))

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space; compare vectors only under equal fingerprints."""
        return self.manifest.fingerprint

    @property
    def stats(self) -> Stats:
        """What was embedded so far."""
        return self._stats

    def embed_texts(
        self,
        texts: Iterable[str],
        language: str | Sequence[str] | None = None,
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
    ) -> NDArray[Any]:
        """Embed texts; see ``iter_texts`` for a corpus that does not fit in memory.

        Args:
            texts: Text over the context length is cut, and counted in ``stats``.
            language: FLORES-200 or BCP-47 code, one for all texts or one per text. Required where the
                tower has language tokens; elsewhere it is checked and makes no difference.
            dim: One of ``dims``; the full width by default.
            encoding: See ``runtime.embeddings``.
            max_batch_tokens: Rows × padded length of one run, in tokens.

        Returns:
            float32 (texts, dim), L2-normalised, in input order; int8 (texts, dim) or uint8
            (texts, ceil(dim / 8)) in the other encodings.

        Raises:
            InputError: something that is no text, or a width that the model does not have.
            LanguageError: a language is missing, unknown, or not spoken by the tower.
            EngineError: the text tower cannot be opened, or failed.

        Source:
            Tokens: ``runtime/text.py``. Pooling and projection: ``export/families/``.
        """
        parts = self.iter_texts(
            texts, language, dim=dim, encoding=encoding, max_batch_tokens=max_batch_tokens
        )
        return np.concatenate([_no_vectors(dim or self.dim, encoding), *parts])

    def iter_texts(
        self,
        texts: Iterable[str],
        language: str | Iterable[str] | None = None,
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
    ) -> Iterator[NDArray[Any]]:
        """Embed texts lazily, in input order; arguments and errors as of ``embed_texts``.

        Yields:
            Arrays of up to 4,096 rows; texts are read, sorted by length and embedded 4,096 at a time.
        """
        pairs = texts_with_languages(texts, language)
        output, width = self._output(Modality.TEXT, dim)
        _no_vectors(width, encoding)
        if max_batch_tokens < 1:
            raise InputError(f"max_batch_tokens is {max_batch_tokens}; expected at least 1.")

        def parts() -> Iterator[NDArray[Any]]:
            for window in windows(pairs, _WINDOW_TEXTS):
                vectors, stats = self._text_tower().vectors_from_texts(
                    window, output=output, dim=width, max_batch_tokens=max_batch_tokens
                )
                self._count(stats)
                yield encoded_from_float(vectors, encoding)

        return parts()

    def embed_images(
        self,
        images: Iterable[ImageSource],
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        batch_size: int = 32,
    ) -> NDArray[Any]:
        """Embed images; see ``iter_images`` for a corpus that does not fit in memory.

        Args:
            images: Paths, bytes of image files, PIL images or uint8 (height, width, 3) arrays.
            dim: One of ``dims``; the full width by default.
            encoding: See ``runtime.embeddings``.
            batch_size: Images of one run.

        Returns:
            float32 (images, dim), L2-normalised, in input order; int8 (images, dim) or uint8
            (images, ceil(dim / 8)) in the other encodings.

        Raises:
            ImageError: something that is no decodable image.
            InputError: a single image instead of several, or a width that the model does not have.
            EngineError: the image tower cannot be opened, or failed.

        Source:
            Pixels: ``runtime/image.py``. Normalisation and tower: ``export/families/``.
        """
        parts = self.iter_images(images, dim=dim, encoding=encoding, batch_size=batch_size)
        return np.concatenate([_no_vectors(dim or self.dim, encoding), *parts])

    def iter_images(
        self,
        images: Iterable[ImageSource],
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        batch_size: int = 32,
    ) -> Iterator[NDArray[Any]]:
        """Embed images lazily, in input order; arguments and errors as of ``embed_images``.

        Yields:
            One array a batch; images are read and decoded a batch at a time.
        """
        output, width = self._output(Modality.IMAGE, dim)
        _no_vectors(width, encoding)
        batches = windows(enumerate(require_several(images)), batch_size)

        def parts() -> Iterator[NDArray[Any]]:
            for batch in batches:
                vectors, stats = self._image_tower().vectors_from_images(batch, output=output, dim=width)
                self._count(stats)
                yield encoded_from_float(vectors, encoding)

        return parts()

    def token_rows(self, texts: Sequence[Text]) -> list[TokenRow]:
        """First stage of texts: token ids, in input order; needs no graph.

        Raises:
            InputError: a text holds a lone surrogate.
            LanguageError: a language is missing, unknown, or not spoken by the tower.
        """
        return self._tokenizer.rows_from_texts(texts)

    def vectors_from_tokens(self, batch: TokenBatch, *, dim: int | None = None) -> NDArray[np.float32]:
        """Second stage of texts: one run of the text tower, on the calling thread.

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
        """Second stage of images, after ``runtime.image``: one run of the image tower.

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

    def close(self) -> None:
        """Release both graphs; what is embedded after this is an EngineError."""
        with self._lock:
            self._closed = True
            for tower in (self._text, self._image):
                if tower is not None:
                    tower.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _text_tower(self) -> TextTower:
        with self._lock:
            self._require_open()
            if self._text is None:
                backend = self._graphs.open(self._variant.text)
                self._text = TextTower(self._tokenizer, backend, self.manifest.text.pad_id)
            return self._text

    def _image_tower(self) -> ImageTower:
        with self._lock:
            self._require_open()
            if self._image is None:
                backend = self._graphs.open(self._variant.image)
                decoders = ThreadPoolExecutor(self._graphs.n_threads, "babeltower-decode")
                self._image = ImageTower(self.manifest.image, backend, decoders, self._max_pixels)
            return self._image

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError(
                f"The encoder of {self.manifest.name} is closed. Open it again with Encoder.open."
            )

    def _count(self, stats: Stats) -> None:
        with self._lock:
            self._stats += stats

    def _output(self, modality: Modality, dim: int | None) -> tuple[str, int]:
        """Name and width of the output that gives vectors of a width."""
        outputs = self._variant.tower(modality).outputs
        width = self.dim if dim is None else dim
        if width not in self.dims or str(width) not in outputs:
            raise InputError(
                f"{self.manifest.name} has no vectors of width {width}; it has {list(self.dims)}. Narrower "
                "ones are heads of their own: a cut vector is none of them."
            )
        return outputs[str(width)], width


def _no_vectors(width: int, encoding: Encoding | str) -> NDArray[Any]:
    return encoded_from_float(np.empty((0, width), dtype=np.float32), encoding)


def _choice(kind: type[Choice], value: Choice | str, name: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise EngineError(
            f"{name} {value!r} is unknown; expected one of {[known.value for known in kind]}."
        ) from None
