"""Encoder interface: embeds texts and images into one vector space."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.counts import whole_number
from runtime.embeddings import Encoding, encoded_from_float
from runtime.errors import InputError
from runtime.manifest import Engine, Precision, model_location
from runtime.preprocessing.image import ImageSource
from runtime.towers import Stats

if TYPE_CHECKING:
    from runtime.remote import Connection

__all__ = ["Encoder", "no_vectors"]

Opened = TypeVar("Opened", bound="Encoder")


class Encoder(ABC):
    """A model opened for inference, in process or on a server; safe to use from several threads.

    Use it as a context manager, or call ``close``.
    """

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        engine: Engine | str | None = None,
        precision: Precision | str | None = None,
        threads: int | None = None,
        default_language: str | None = None,
        verify: bool = True,
        provider: str | None = None,
        max_pixels: int | None = None,
        instances: int = 1,
        cache: str | os.PathLike[str] | None = None,
        device: str | None = None,
        connection: Connection | None = None,
    ) -> Encoder:
        """Open ``REPOSITORY/NAME`` in process, or ``grpc://HOST:PORT/NAME`` on a server.

        Args:
            model: Path of the model, a repository folder and the name of a manifest in it; or the address
                of a server: ``grpc://``, ``grpcs://``, ``http://`` or ``https://``.
            engine: ``onnxruntime`` (the default), ``openvino``, ``cuda`` (the default on a GPU) or
                ``tensorrt``. With an address, the engine that the server must run; by default any.
            precision: ``fp32`` (the default), ``fp16``, ``bf16``, ``int8`` or ``fp8``, if the model was
                exported in it and measured on that engine. With an address, the precision that the server
                must serve; by default any.
            threads: Threads per run; ``None`` uses every physical core. A GPU ignores it.
            default_language: Language of texts without one.
            verify: Check every file against its recorded sha256, and, when a tower is first opened on this
                machine, its vectors for a few probes against PyTorch's. ``False`` skips both with a warning.
            provider: ONNX Runtime's execution provider or OpenVINO's device; default: the CPU.
            max_pixels: Width × height above which an image is rejected; default: Pillow's limit.
            instances: Concurrent runs, of ``threads`` threads each, when several threads embed.
            cache: Folder that records which towers passed their check on this machine; default: in the
                user's cache. If it is not writable, towers are checked every time.
            device: ``cpu``, ``cuda`` or ``cuda:N``; default: the processor, or the first GPU for an engine
                that needs one. A tower never runs elsewhere, nor in part.
            connection: Connection options of a server: TLS, token, concurrency, retries; addresses only.

        ``threads``, ``provider``, ``max_pixels``, ``instances``, ``cache`` and ``device`` are set on the
        server and are rejected with an address. ``verify`` applies to local files and towers; a server checks
        its own before it is ready, and its fingerprint is read at every new connection.

        Raises:
            ManifestError: there is no such model or precision, or a file does not match its manifest.
            EngineError: the engine or precision is unknown, or not the server's. In process, a graph is
                opened at the tower's first use: errors of the engine are raised then, and an
                OpeningCheckError if the tower's vectors differ from PyTorch's on this machine.
            LanguageError: the default language is unknown, or not supported by the tower.
            ServerError: the server cannot be reached, or serves another model or embedding space.
            InputError: an option is not allowed with a path, or with an address.
        """
        address = model_location(model)
        if "://" in address:
            return _remote(
                address,
                connection,
                engine=engine,
                precision=precision,
                default_language=default_language,
                local={
                    "threads": threads,
                    "provider": provider,
                    "max_pixels": max_pixels,
                    "instances": None if instances == 1 else instances,
                    "cache": cache,
                    "device": device,
                },
            )
        if connection is not None:
            raise InputError(
                f"{address} is a path; connection is only for an address such as grpc://HOST/NAME."
            )
        from runtime.local import LocalEncoder

        return LocalEncoder.from_repository(
            address,
            engine=engine,
            precision=precision,
            threads=threads,
            default_language=default_language,
            verify=verify,
            provider=provider,
            max_pixels=max_pixels,
            instances=instances,
            cache=cache,
            device=device,
        )

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the model."""

    @property
    @abstractmethod
    def dims(self) -> tuple[int, ...]:
        """Available vector widths, ascending; the last is ``dim``."""

    @property
    def dim(self) -> int:
        """Full width of a vector."""
        return self.dims[-1]

    def require_width(self, dim: int | None) -> int:
        """Return a vector width: ``dim``, by default the full width.

        Raises:
            InputError: the model has no vectors of that width.
        """
        width = self.dim if dim is None else whole_number(dim, "dim")
        if width not in self.dims:
            raise InputError(
                f"{self.name} has no vectors of width {width}; it has {list(self.dims)}. Narrower widths "
                "have their own MRL heads: truncated vectors are not valid."
            )
        return width

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the embedding space; only vectors with equal fingerprints are comparable."""

    @property
    @abstractmethod
    def stats(self) -> Stats:
        """Counts of everything embedded so far."""

    def embed_texts(
        self,
        texts: Iterable[str],
        language: str | Sequence[str] | None = None,
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        max_batch_tokens: int | None = None,
    ) -> NDArray[Any]:
        """Embed texts; see ``iter_texts`` for a corpus that does not fit in memory.

        Args:
            texts: Texts over the context length are truncated, and counted in ``stats``.
            language: FLORES-200 or BCP-47 code, one for all texts or one per text. Required if the tower has
                language tokens; otherwise it is checked but has no effect.
            dim: One of ``dims``; default: the full width.
            encoding: See ``runtime.embeddings``.
            max_batch_tokens: Rows × padded length of one batch, in tokens; default: 2,048, and 16,384 on a
                GPU. A server has its own budget.

        Returns:
            float32 (texts, dim), L2-normalised, in input order; float16 or int8 (texts, dim) or uint8
            (texts, ceil(dim / 8)) in the other encodings.

        Raises:
            InputError: an input is not a text, or the model does not have the width.
            LanguageError: a language is missing, unknown, or not supported by the tower.
            EngineError: the text tower cannot be opened, or failed.
            UnansweredError: the server became unavailable; the error lists the unanswered texts.

        Source:
            Tokens: ``runtime/preprocessing/text.py``. Pooling and projection: ``export/families/``.
        """
        parts = self.iter_texts(
            texts, language, dim=dim, encoding=encoding, max_batch_tokens=max_batch_tokens
        )
        return np.concatenate([no_vectors(dim or self.dim, encoding), *parts])

    @abstractmethod
    def iter_texts(
        self,
        texts: Iterable[str],
        language: str | Iterable[str] | None = None,
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        max_batch_tokens: int | None = None,
    ) -> Iterator[NDArray[Any]]:
        """Embed texts lazily, in input order; arguments and errors as in ``embed_texts``.

        Yields:
            Arrays of up to 4,096 rows. In process, texts are read, sorted by length and embedded 4,096 at a
            time; with a server, one request at a time.
        """

    def embed_images(
        self,
        images: Iterable[ImageSource],
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        batch_size: int | None = None,
    ) -> NDArray[Any]:
        """Embed images; see ``iter_images`` for a corpus that does not fit in memory.

        Args:
            images: Paths, bytes of image files, PIL images or uint8 (height, width, 3) arrays. Supported file
                formats are ``runtime.preprocessing.image_formats.FORMATS``. Paths and bytes are decoded on
                all threads; files are read with their batch. PIL images and arrays are copied on the calling
                thread, before the next image is requested.
            dim: One of ``dims``; default: the full width.
            encoding: See ``runtime.embeddings``.
            batch_size: Images per run or request; default: 32, and 128 on a GPU.

        Returns:
            float32 (images, dim), L2-normalised, in input order; float16 or int8 (images, dim) or uint8
            (images, ceil(dim / 8)) in the other encodings.

        Raises:
            ImageError: an input is not a decodable image.
            InputError: a single image was passed instead of several, or the model does not have the width.
            EngineError: the image tower cannot be opened, or failed.
            UnansweredError: the server became unavailable; the error lists the unanswered images.

        Source:
            Pixels: ``runtime/preprocessing/image.py``. Normalisation and tower: ``export/families/``.
        """
        parts = self.iter_images(images, dim=dim, encoding=encoding, batch_size=batch_size)
        return np.concatenate([no_vectors(dim or self.dim, encoding), *parts])

    @abstractmethod
    def iter_images(
        self,
        images: Iterable[ImageSource],
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        batch_size: int | None = None,
    ) -> Iterator[NDArray[Any]]:
        """Embed images lazily, in input order; arguments and errors as in ``embed_images``.

        Yields:
            One array per batch; images are read and decoded one batch at a time.
        """

    @abstractmethod
    def checked_image(self, source: ImageSource, *, name: str | None = None) -> ImageSource:
        """Check that an image can be decoded, before passing the result to ``embed_images``.

        Returns:
            Cheapest equivalent source, with the same vector: in process, the image at the tower's size.

        Raises:
            ImageError: the image cannot be decoded.
        """

    @abstractmethod
    def close(self) -> None:
        """Release all resources; embedding afterwards is an error."""

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def no_vectors(width: int, encoding: Encoding | str) -> NDArray[Any]:
    """Return an empty array (0, ...) in an encoding; an unknown encoding is an InputError."""
    return encoded_from_float(np.empty((0, width), dtype=np.float32), encoding)


def _remote(
    address: str,
    connection: Connection | None,
    *,
    engine: Engine | str | None,
    precision: Precision | str | None,
    default_language: str | None,
    local: Mapping[str, Any],
) -> Encoder:
    from runtime.remote import Connection, RemoteEncoder, address_from_text

    address_from_text(address)
    given = [name for name, value in local.items() if value is not None]
    if given:
        raise InputError(f"{', '.join(given)} is set on the server; leave it out with address {address}.")
    return RemoteEncoder.connect(
        address,
        connection or Connection(),
        engine=engine,
        precision=precision,
        default_language=default_language,
    )
