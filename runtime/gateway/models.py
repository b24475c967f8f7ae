"""Models behind the gateway, on a server or in this process, behind one interface."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.encoder import Encoder
from runtime.errors import InputError
from runtime.gateway.batching import BatchingQueue
from runtime.gateway.idle import IdleTimer
from runtime.local import LocalEncoder
from runtime.logs import LOGGER
from runtime.machine import n_cores, return_free_memory
from runtime.manifest import Modality
from runtime.preprocessing.image import DecodingCost, pixels_from_file
from runtime.preprocessing.image_work import DecodingMemory, costs_of_files, name_of_row
from runtime.preprocessing.served_limits import SERVED_MEMORY_BYTES, SERVED_PIXELS, largest_file_bytes
from runtime.preprocessing.text import Text
from runtime.remote.calls import Caller
from runtime.remote.options import Address, Connection
from runtime.remote.payloads import RequestRows, concatenated
from runtime.remote.transport import open_transport

__all__ = [
    "GatewayModel",
    "LocalModel",
    "ModelOpener",
    "RemoteModel",
    "Residence",
    "local_opener",
    "remote_opener",
]

_TEXTS_PER_REQUEST, _IMAGES_PER_REQUEST = 32, 8
_CONCURRENCY = 256
_BATCH_TEXTS, _BATCH_IMAGES = 256, 32

T = TypeVar("T")


class GatewayModel(Protocol):
    """Model that embeds; use it from the event loop that opened it."""

    name: str
    dims: tuple[int, ...]
    fingerprint: str

    async def texts(self, texts: Sequence[tuple[int, str, str | None]], dim: int) -> NDArray[np.float32]:
        """Embed (position, text, language): float32 (texts, dim).

        Raises:
            BabeltowerError: a text is rejected, named by its position; or the model failed.
        """

    async def images(self, images: Sequence[tuple[int, bytes]], dim: int) -> NDArray[np.float32]:
        """Embed (position, image file): float32 (images, dim); errors as of ``texts``."""

    async def close(self) -> None:
        """Release the model."""


ModelOpener = Callable[[], Awaitable[GatewayModel]]
"""Function that opens a model on the running event loop."""


def remote_opener(address: Address, connection: Connection) -> ModelOpener:
    """Return the opener of a model on a server; errors as of ``Encoder.open`` with an address."""
    connection.require_fitting(address)
    connection = dataclasses.replace(connection, concurrency=max(_CONCURRENCY, connection.concurrency))

    async def opened() -> GatewayModel:
        caller = Caller(open_transport(address, connection), connection, str(address))
        try:
            served = await caller.open(address.name)
        except BaseException:
            await caller.close()
            raise
        return RemoteModel(served.name, served.dims, served.fingerprint, caller, dict(served.max_batch_sizes))

    return opened


class RemoteModel:
    """Model on a server, which batches requests of all clients."""

    def __init__(
        self,
        name: str,
        dims: tuple[int, ...],
        fingerprint: str,
        caller: Caller,
        max_rows: dict[Modality, int],
    ) -> None:
        self.name, self.dims, self.fingerprint = name, dims, fingerprint
        self._caller = caller
        self._max_rows = max_rows

    async def texts(self, texts: Sequence[tuple[int, str, str | None]], dim: int) -> NDArray[np.float32]:
        """See ``GatewayModel``."""
        size = min(_TEXTS_PER_REQUEST, self._max_rows[Modality.TEXT])
        requests = [
            RequestRows(
                Modality.TEXT,
                tuple(place for place, _, _ in part),
                {
                    "text": tuple(_encoded(text, f"Text {place}") for place, text, _ in part),
                    "language": tuple(_encoded(code or "", "A language") for _, _, code in part),
                },
            )
            for part in _parts(texts, size)
        ]
        return await self._vectors(requests, dim)

    async def images(self, images: Sequence[tuple[int, bytes]], dim: int) -> NDArray[np.float32]:
        """See ``GatewayModel``."""
        size = min(_IMAGES_PER_REQUEST, self._max_rows[Modality.IMAGE])
        found = []
        for part in _parts(images, size):  # one after the other, as the memory of a request is bounded
            places, files = tuple(place for place, _ in part), tuple(file for _, file in part)
            rows = RequestRows(Modality.IMAGE, places, {"image": files})
            found.append(await self._caller.vectors(rows, dim=dim))
        return concatenated(found, dim)

    async def close(self) -> None:
        """See ``GatewayModel``."""
        await self._caller.close()

    async def _vectors(self, requests: Sequence[RequestRows], dim: int) -> NDArray[np.float32]:
        return concatenated(await gathered([self._caller.vectors(r, dim=dim) for r in requests]), dim)


@dataclass(frozen=True, slots=True)
class Residence:
    """Time that towers of this process stay in memory.

    Attributes:
        unload_after_s: Seconds without a request after which a tower's memory is given back; ``None`` for
            never.
        kept: Towers that stay.
    """

    unload_after_s: float | None = None
    kept: frozenset[Modality] = frozenset()

    def seconds_of(self, modality: Modality) -> float | None:
        """Return the seconds for one tower; ``None`` for ever."""
        return None if modality in self.kept else self.unload_after_s


def local_opener(
    encoder: Encoder, residence: Residence | None = None, *, memory_bytes: int = SERVED_MEMORY_BYTES
) -> ModelOpener:
    """Return the opener of a model in this process.

    Args:
        memory_bytes: Maximum memory of a request.

    Raises:
        InputError: the encoder is of a server.
    """
    if not isinstance(encoder, LocalEncoder):
        raise InputError("The encoder is on a server; pass its address instead.")

    async def opened() -> GatewayModel:
        return LocalModel(encoder, residence or Residence(), memory_bytes)

    return opened


class LocalModel:
    """Model in this process, whose towers run batches of all clients, and are opened again when needed."""

    def __init__(self, encoder: LocalEncoder, residence: Residence, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self.name, self.dims, self.fingerprint = encoder.name, encoder.dims, encoder.fingerprint
        self._encoder = encoder
        self._workers = ThreadPoolExecutor(n_cores(), "babeltower-prepare")
        self._memory = DecodingMemory(memory_bytes)
        self._texts: BatchingQueue[Text] = BatchingQueue(
            lambda rows, dim: self._opened(Modality.TEXT).vectors_from_texts(rows, dim=dim),
            max_rows=_BATCH_TEXTS,
        )
        self._images: BatchingQueue[NDArray[np.uint8]] = BatchingQueue(
            lambda rows, dim: self._opened(Modality.IMAGE).vectors_from_pixels(np.stack(rows), dim=dim),
            max_rows=_BATCH_IMAGES,
        )
        queues: dict[Modality, BatchingQueue[Any]] = {
            Modality.TEXT: self._texts,
            Modality.IMAGE: self._images,
        }
        self._idle = {
            modality: IdleTimer(residence.seconds_of(modality), self._unloader(modality, queue))
            for modality, queue in queues.items()
        }
        for timer in self._idle.values():
            timer.start()

    async def texts(self, texts: Sequence[tuple[int, str, str | None]], dim: int) -> NDArray[np.float32]:
        """See ``GatewayModel``."""
        rows = [Text(text, place, code) for place, text, code in texts]
        with self._idle[Modality.TEXT].used():
            await self._worked(self._require_texts, rows)  # a bad text fails here, not in its batch
            return concatenated(
                await gathered([self._texts.vectors(part, dim) for part in _parts(rows, _BATCH_TEXTS)]), dim
            )

    async def images(self, images: Sequence[tuple[int, bytes]], dim: int) -> NDArray[np.float32]:
        """See ``GatewayModel``."""
        preprocessing = self._encoder.manifest.image
        costs = await self._worked(self._costs, images)

        def pixels(costly: tuple[tuple[int, bytes], DecodingCost]) -> NDArray[np.uint8]:
            (place, file), cost = costly
            with self._memory.taken(cost.n_bytes):
                return pixels_from_file(
                    file, preprocessing, cost, name=name_of_row(place, file), max_pixels=SERVED_PIXELS
                )

        with self._idle[Modality.IMAGE].used():
            rows = await gathered([self._worked(pixels, one) for one in zip(images, costs, strict=True)])
            return concatenated(
                await gathered([self._images.vectors(part, dim) for part in _parts(rows, _BATCH_IMAGES)]), dim
            )

    async def close(self) -> None:
        """See ``GatewayModel``."""
        for timer in self._idle.values():
            await timer.close()
        await self._texts.close()
        await self._images.close()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _opened(self, modality: Modality) -> LocalEncoder:
        """Return the encoder, after opening a tower that is not in memory."""
        if not self._encoder.is_tower_open(modality):
            start = time.perf_counter()
            self._encoder.open_tower(modality)
            seconds = time.perf_counter() - start
            LOGGER.info("%s: opened the %s tower in %.2f s", self.name, modality.value, seconds)
        return self._encoder

    def _unloader(self, modality: Modality, queue: BatchingQueue[Any]) -> Callable[[], Awaitable[None]]:
        def unloaded() -> None:
            if self._encoder.is_tower_open(modality):
                self._encoder.release_tower(modality)
                gc.collect()  # sessions refer to themselves
                return_free_memory()
                LOGGER.info("%s: gave back the memory of the %s tower", self.name, modality.value)

        return lambda: queue.between_batches(unloaded)

    def _costs(self, images: Sequence[tuple[int, bytes]]) -> list[DecodingCost]:
        """Return what decoding images takes, by their headers; errors as of ``costs_of_files``."""
        return costs_of_files(
            [file for _, file in images],
            self._encoder.manifest.image,
            max_bytes=largest_file_bytes(self._memory_bytes),
            max_memory_bytes=self._memory_bytes,
            places=[place for place, _ in images],
        )

    def _require_texts(self, rows: Sequence[Text]) -> None:
        """Check that texts can be tokenized; the error names the first that cannot."""
        try:
            self._encoder.token_rows(rows)
        except InputError:
            for row in rows:
                try:
                    self._encoder.token_rows([row])
                except InputError as error:
                    raise type(error)(f"Text {row.index}: {error}") from error
            raise

    async def _worked(self, work: Callable[[Any], T], given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, given)


async def gathered(work: Sequence[Awaitable[T]]) -> list[T]:
    """Await all; if one fails, or the caller is cancelled, the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _parts(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _encoded(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds a lone surrogate at character {error.start}.") from None
