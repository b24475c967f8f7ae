"""The encoder: a model's texts and images as vectors of one space."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.embeddings import Encoding, encoded_from_float
from runtime.errors import InputError
from runtime.manifest import Engine, Precision
from runtime.preprocessing.image import ImageSource
from runtime.towers import Stats

if TYPE_CHECKING:
    from runtime.remote import Connection

__all__ = ["DEFAULT_MAX_BATCH_TOKENS", "Encoder", "no_vectors"]

Opened = TypeVar("Opened", bound="Encoder")

DEFAULT_MAX_BATCH_TOKENS = 2_048


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
        connection: Connection | None = None,
    ) -> Encoder:
        """Open ``REPOSITORY/NAME`` in process, or ``grpc://HOST:PORT/NAME`` on a server.

        Args:
            model: Path of the model: a repository's folder and the name of a manifest in it. Or the address
                of a server: ``grpc://``, ``grpcs://``, ``http://`` or ``https://``.
            engine: ``onnxruntime`` (the default), ``openvino`` or ``tensorrt``. With an address, what the
                server must run; by default whatever it runs.
            precision: ``fp32`` (the default), ``fp16``, ``bf16``, ``int8`` or ``fp8``, if the model was
                exported in it and measured on that engine. With an address, what the server must hold; by
                default whatever it holds.
            threads: Threads of one run; ``None`` takes every physical core.
            default_language: Language of the texts that name none.
            verify: Compare every file with its recorded sha256, and, where a tower is first opened on this
                machine, its vectors of a few probes with PyTorch's. ``False`` skips both, and logs a warning.
            provider: ONNX Runtime's execution provider or OpenVINO's device; the CPU by default.
            max_pixels: Width × height above which an image is refused; Pillow's limit by default.
            instances: Runs that may go on at once, on ``threads`` threads each, when several threads embed.
            cache: Folder in which it is remembered which towers gave PyTorch's vectors here; in the user's
                cache by default. One that cannot be written is no error: towers are checked each time.
            connection: How to reach a server: TLS, token, concurrency, retries; for addresses only.

        ``threads``, ``provider``, ``max_pixels``, ``instances`` and ``cache`` are set on the server: with an
        address they are refused. ``verify`` concerns files and their towers; a server has checked its own
        before it was ready, and its fingerprint is read at every new connection.

        Raises:
            ManifestError: there is no such model or precision, or a file does not fit its manifest.
            EngineError: an unknown engine or precision, or not what the server runs. In process a graph is
                opened at the tower's first use: what the engine refuses is raised there, and so is an
                OpeningCheckError where the tower's vectors are not PyTorch's on this machine.
            LanguageError: the default language is unknown, or not spoken by the tower.
            ServerError: the server cannot be reached, does not serve the model, or another embedding space.
            InputError: an option that does not go with a path, or with an address.
        """
        address = os.fspath(model)
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
                },
            )
        if connection is not None:
            raise InputError(
                f"{address} is a path; connection goes with an address such as grpc://HOST/NAME."
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
        )

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's name."""

    @property
    @abstractmethod
    def dims(self) -> tuple[int, ...]:
        """Every width that can be asked for, ascending; the last is ``dim``."""

    @property
    def dim(self) -> int:
        """Full width of a vector."""
        return self.dims[-1]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the embedding space; compare vectors only under equal fingerprints."""

    @property
    @abstractmethod
    def stats(self) -> Stats:
        """What was embedded so far."""

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
            max_batch_tokens: Rows × padded length of one run, in tokens; a server has its own budget.

        Returns:
            float32 (texts, dim), L2-normalised, in input order; int8 (texts, dim) or uint8
            (texts, ceil(dim / 8)) in the other encodings.

        Raises:
            InputError: something that is no text, or a width that the model does not have.
            LanguageError: a language is missing, unknown, or not spoken by the tower.
            EngineError: the text tower cannot be opened, or failed.
            UnansweredError: the server went away; it names the texts without an answer.

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
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
    ) -> Iterator[NDArray[Any]]:
        """Embed texts lazily, in input order; arguments and errors as of ``embed_texts``.

        Yields:
            Arrays of up to 4,096 rows. In process, texts are read, sorted by length and embedded 4,096 at a
            time; from a server, a request at a time.
        """

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
            images: Paths, bytes of image files, PIL images or uint8 (height, width, 3) arrays. Files are of
                the formats of ``runtime.preprocessing.image_formats.FORMATS``.
                Paths and bytes are decoded on all threads;
                PIL images and arrays are copied on the calling one, before the next image is asked for, and
                a file is read when its batch is.
            dim: One of ``dims``; the full width by default.
            encoding: See ``runtime.embeddings``.
            batch_size: Images of one run, or of one request.

        Returns:
            float32 (images, dim), L2-normalised, in input order; int8 (images, dim) or uint8
            (images, ceil(dim / 8)) in the other encodings.

        Raises:
            ImageError: something that is no decodable image.
            InputError: a single image instead of several, or a width that the model does not have.
            EngineError: the image tower cannot be opened, or failed.
            UnansweredError: the server went away; it names the images without an answer.

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
        batch_size: int = 32,
    ) -> Iterator[NDArray[Any]]:
        """Embed images lazily, in input order; arguments and errors as of ``embed_images``.

        Yields:
            One array a batch; images are read and decoded a batch at a time.
        """

    @abstractmethod
    def checked_image(self, source: ImageSource, *, name: str | None = None) -> ImageSource:
        """Decode an image ahead of ``embed_images``, which then gives the vector of ``source`` for it.

        Returns:
            What is cheapest to keep: in process, the image in the tower's size.

        Raises:
            ImageError: it is no decodable image.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what is held; to embed after this is an error."""

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
    """(0, ...) in an encoding; an unknown encoding is an InputError."""
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
    given = [name for name, value in local.items() if value is not None]
    if given:
        raise InputError(f"{address} is an address; {', '.join(given)} is the server's matter: set it there.")
    from runtime.remote import Connection, RemoteEncoder

    return RemoteEncoder.connect(
        address,
        connection or Connection(),
        engine=engine,
        precision=precision,
        default_language=default_language,
    )
