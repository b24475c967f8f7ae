"""Requests of several clients as one batch: those that arrive while a batch is computed form the next one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.gateway.failures import GatewayError

__all__ = ["BatchingQueue"]

T = TypeVar("T")


@dataclass(slots=True)
class _Waiting(Generic[T]):
    rows: Sequence[T]
    dim: int
    answer: asyncio.Future[NDArray[np.float32]]


class BatchingQueue(Generic[T]):
    """Queue in front of a tower in this process; use it from one event loop.

    A request whose sender has left is not computed. If a batch fails for its input, each of its requests is
    computed alone, so that only the bad one fails.

    Args:
        run: Computes rows of one width, on another thread: float32 (rows, dim).
        max_rows: Rows of a batch; a larger request is a batch of its own.
        max_waiting: Rows that may wait; further requests are told to come back later.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T], int], NDArray[np.float32]],
        *,
        max_rows: int,
        max_waiting: int = 16_384,
    ) -> None:
        self._run = run
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting[T]] = deque()
        self._n_waiting = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "babeltower-tower")
        self._task = asyncio.ensure_future(self._serve())

    async def vectors(self, rows: Sequence[T], dim: int) -> NDArray[np.float32]:
        """Return the vectors of a request's rows: float32 (rows, dim).

        Raises:
            GatewayError: too many rows wait already.
            BabeltowerError: see ``run``.
        """
        if self._n_waiting + len(rows) > self._max_waiting:
            raise GatewayError(503, "Too many inputs are waiting. Try again later.", code="overloaded")
        request = _Waiting(rows, dim, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._n_waiting += len(rows)
        self._arrived.set()
        return await request.answer

    async def between_batches(self, work: Callable[[], None]) -> None:
        """Run work on the tower's thread, while it computes nothing; later requests are computed after it."""
        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def close(self) -> None:
        """Stop; waiting requests are cancelled."""
        self._task.cancel()
        for request in self._waiting:
            request.answer.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            await self._answer(batch)

    def _next_batch(self) -> list[_Waiting[T]]:
        """Take the oldest requests of one width whose senders are still there."""
        batch: list[_Waiting[T]] = []
        n_rows = 0
        while self._waiting:
            request = self._waiting[0]
            if request.answer.done():
                self._taken()
                continue
            fits = (
                n_rows + len(request.rows) <= self._max_rows and request.dim == batch[0].dim
                if batch
                else True
            )
            if not fits:
                break
            n_rows += len(request.rows)
            batch.append(self._taken())
        return batch

    def _taken(self) -> _Waiting[T]:
        request = self._waiting.popleft()
        self._n_waiting -= len(request.rows)
        return request

    async def _answer(self, batch: Sequence[_Waiting[T]]) -> None:
        rows = [row for request in batch for row in request.rows]
        try:
            vectors = await self._computed(rows, batch[0].dim)
        except InputError as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            for request in batch:
                await self._answer([request])
        except Exception as error:
            _fail(batch, error)
        else:
            start = 0
            for request in batch:
                end = start + len(request.rows)
                if not request.answer.done():
                    request.answer.set_result(vectors[start:end])
                start = end

    async def _computed(self, rows: Sequence[T], dim: int) -> NDArray[np.float32]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, rows, dim)


def _fail(batch: Sequence[_Waiting[Any]], error: Exception) -> None:
    for request in batch:
        if not request.answer.done():
            request.answer.set_exception(error)
