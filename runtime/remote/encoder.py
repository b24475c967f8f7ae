"""Encoder of a model on a server, with the same results and errors as in process."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.counts import require_count
from runtime.embeddings import Encoding, encoded_from_float
from runtime.encoder import Encoder, no_vectors
from runtime.errors import EngineError, UnansweredError
from runtime.manifest import Engine, Modality, Precision, choice_from_value
from runtime.preprocessing.image import ImageSource, decode, require_several, snapshot_from_source
from runtime.preprocessing.text import require_texts, texts_with_languages
from runtime.remote.calls import Caller, NoAnswerError, event_loop
from runtime.remote.options import Address, Connection, address_from_text
from runtime.remote.payloads import (
    RequestRows,
    bytes_from_image,
    concatenated,
    rows_from_images,
    rows_from_texts,
)
from runtime.remote.served_model import ServedModel, require_served_model
from runtime.remote.transport import open_transport
from runtime.towers import Stats

__all__ = ["RemoteEncoder"]

_BATCH_IMAGES = 32
"""Images in a request, unless the caller says otherwise."""

T = TypeVar("T")

_AHEAD = 2
"""Pending requests per concurrent one, so that a slow first request does not idle the others."""


class RemoteEncoder(Encoder):
    """Encoder of a model on a server; safe to use from several threads, which share its connection.

    ``stats`` counts texts and images; tokens, padding and truncation are in the server's metrics. Texts over
    the context length are truncated on the server, as in process.
    """

    def __init__(
        self,
        address: Address,
        connection: Connection,
        caller: Caller,
        served: ServedModel,
        default_language: str | None,
    ) -> None:
        self.address = address
        self.served = served
        self._connection = connection
        self._caller = caller
        self._default_language = default_language
        self._stats = Stats()
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def connect(
        cls,
        address: str,
        connection: Connection,
        *,
        engine: Engine | str | None = None,
        precision: Precision | str | None = None,
        default_language: str | None = None,
    ) -> RemoteEncoder:
        """Open an address; see ``Encoder.open``."""
        wanted_engine = None if engine is None else choice_from_value(Engine, engine, "Engine")
        wanted = None if precision is None else choice_from_value(Precision, precision, "Precision")
        parsed = address_from_text(address)
        connection.require_fitting(parsed)

        async def opened() -> tuple[Caller, ServedModel]:
            caller = Caller(open_transport(parsed, connection), connection, str(parsed))
            try:
                served = await caller.open(parsed.name)
                require_served_model(
                    served, engine=wanted_engine, precision=wanted, fingerprint=connection.fingerprint
                )
            except BaseException:
                await caller.close()
                raise
            return caller, served

        caller, served = _submitted(opened()).result()
        encoder = cls(parsed, connection, caller, served, default_language)
        if default_language is not None:
            try:
                encoder.embed_texts(["a"], default_language)  # the server checks the language
            except BaseException:
                encoder.close()
                raise
            encoder._stats = Stats()
        return encoder

    @property
    def name(self) -> str:
        """Name of the model, the last part of the address."""
        return self.served.name

    @property
    def dims(self) -> tuple[int, ...]:
        """Vector widths reported by the server, ascending."""
        return self.served.dims

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the served space; every answer is of this space, or an error."""
        return self.served.fingerprint

    @property
    def stats(self) -> Stats:
        """Counts of texts and images answered so far."""
        return self._stats

    def embed_texts(
        self,
        texts: Iterable[str],
        language: str | Sequence[str] | None = None,
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        max_batch_tokens: int | None = None,
    ) -> NDArray[Any]:
        """See ``Encoder.embed_texts``."""
        require_texts(texts)
        known = list(texts)
        parts = self.iter_texts(
            known, language, dim=dim, encoding=encoding, max_batch_tokens=max_batch_tokens
        )
        return self._all(parts, lambda: len(known), dim, encoding)

    def iter_texts(
        self,
        texts: Iterable[str],
        language: str | Iterable[str] | None = None,
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        max_batch_tokens: int | None = None,
    ) -> Iterator[NDArray[Any]]:
        """See ``Encoder.iter_texts``; texts are read as requests complete."""
        pairs = texts_with_languages(texts, language)
        width = self.require_width(dim)
        no_vectors(width, encoding)
        if max_batch_tokens is not None:
            require_count(max_batch_tokens, "max_batch_tokens")
        per_request = min(self._connection.texts_per_request, self.served.max_batch_sizes[Modality.TEXT])
        requests = rows_from_texts(
            pairs,
            per_request=per_request,
            default_language=self._default_language,
            most_characters=self.served.most_text.request_characters,
        )
        return self._answers(requests, width, encoding)

    def embed_images(
        self,
        images: Iterable[ImageSource],
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        batch_size: int | None = None,
    ) -> NDArray[Any]:
        """See ``Encoder.embed_images``."""
        counted = _Counted(require_several(images))
        parts = self.iter_images(counted, dim=dim, encoding=encoding, batch_size=batch_size)
        return self._all(parts, counted.n_items, dim, encoding)

    def iter_images(
        self,
        images: Iterable[ImageSource],
        *,
        dim: int | None = None,
        encoding: Encoding | str = Encoding.FLOAT32,
        batch_size: int | None = None,
    ) -> Iterator[NDArray[Any]]:
        """See ``Encoder.iter_images``; pixels are sent losslessly, files unchanged."""
        width = self.require_width(dim)
        no_vectors(width, encoding)
        if batch_size is not None:
            require_count(batch_size, "batch_size")
        per_request = min(batch_size or _BATCH_IMAGES, self.served.max_batch_sizes[Modality.IMAGE])
        requests = rows_from_images(require_several(images), per_request=per_request)
        return self._answers(requests, width, encoding)

    def checked_image(self, source: ImageSource, *, name: str | None = None) -> ImageSource:
        """See ``Encoder.checked_image``; the image is decoded here to check it, but sent unchanged."""
        taken = snapshot_from_source(source, name=name)
        decode(taken)
        return bytes_from_image(taken, name=taken.name)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        _submitted(self._caller.close()).result()

    def _answers(
        self, requests: Iterator[RequestRows], dim: int, encoding: Encoding | str
    ) -> Iterator[NDArray[Any]]:
        """Yield answers in order, reading requests only as far ahead as the concurrency needs."""
        pending: deque[tuple[RequestRows, Future[NDArray[np.float32]]]] = deque()
        try:
            for rows in requests:
                pending.append((rows, self._asked(rows, dim)))
                if len(pending) >= _AHEAD * self._connection.concurrency:
                    yield encoded_from_float(self._first(pending, dim, encoding), encoding)
            while pending:
                yield encoded_from_float(self._first(pending, dim, encoding), encoding)
        finally:
            for _, future in pending:
                future.cancel()

    def _asked(self, rows: RequestRows, dim: int) -> Future[NDArray[np.float32]]:
        if self._closed:
            raise EngineError(f"The encoder of {self.address} is closed. Open it again with Encoder.open.")
        return _submitted(self._caller.vectors(rows, dim=dim))

    def _first(
        self,
        pending: deque[tuple[RequestRows, Future[NDArray[np.float32]]]],
        dim: int,
        encoding: Encoding | str,
    ) -> NDArray[np.float32]:
        rows, future = pending[0]
        try:
            vectors = future.result()
        except NoAnswerError as error:
            raise _unanswered(str(error), pending, dim, encoding) from error
        except CancelledError:
            raise EngineError(f"The encoder of {self.address} was closed while embedding.") from None
        pending.popleft()
        self._count(rows)
        return vectors

    def _count(self, rows: RequestRows) -> None:
        is_text = rows.modality is Modality.TEXT
        with self._lock:
            self._stats += Stats(texts=len(rows)) if is_text else Stats(images=len(rows))

    def _all(
        self,
        parts: Iterator[NDArray[Any]],
        n_inputs: Callable[[], int],
        dim: int | None,
        encoding: Encoding | str,
    ) -> NDArray[Any]:
        """Concatenate all parts; an ``UnansweredError`` is extended to all inputs."""
        found = [no_vectors(self.require_width(dim), encoding)]
        try:
            for part in parts:
                found.append(part)
        except UnansweredError as error:
            n_before = sum(map(len, found))
            answered = [*range(n_before), *error.answered]
            raise UnansweredError(
                error.reason,
                unanswered=sorted(set(range(n_inputs())).difference(answered)),
                answered=answered,
                vectors=np.concatenate([*found, error.vectors]),
            ) from error
        return np.concatenate(found)


class _Counted:
    """Counter around an iterable read once, item by item, since a caller may reuse one object for all."""

    def __init__(self, items: Iterable[ImageSource]) -> None:
        self._items = iter(items)
        self._n_items = 0

    def __iter__(self) -> Iterator[ImageSource]:
        for item in self._items:
            self._n_items += 1
            yield item

    def n_items(self) -> int:
        """Return the number of all items, reading the remaining ones."""
        return self._n_items + sum(1 for _ in self._items)


def _unanswered(
    reason: str,
    pending: Iterable[tuple[RequestRows, Future[NDArray[np.float32]]]],
    dim: int,
    encoding: Encoding | str,
) -> UnansweredError:
    """Build the error from pending requests: finished ones are answered, the others cancelled."""
    answered: list[int] = []
    unanswered: list[int] = []
    vectors: list[NDArray[np.float32]] = []
    for rows, future in pending:
        if future.done() and not future.cancelled() and future.exception() is None:
            answered += rows.places
            vectors.append(future.result())
        else:
            future.cancel()
            unanswered += rows.places
    return UnansweredError(
        reason,
        unanswered=unanswered,
        answered=answered,
        vectors=encoded_from_float(concatenated(vectors, dim), encoding),
    )


def _submitted(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    return asyncio.run_coroutine_threadsafe(coroutine, event_loop())
