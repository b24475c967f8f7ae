"""Several blocking calls at a time, from threads that stay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

__all__ = ["ConcurrentCalls"]

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS = 8
"""Calls in flight beside the caller's own; a batch of texts seldom has more lengths."""


class ConcurrentCalls(Generic[T, R]):
    """Calls of one function, which waits without Python's lock, in flight together.

    Waking a thread takes longer than all that a front end computes for a text. So the caller's thread makes
    the first call, the others are made by threads that do nothing else, and there is no event loop and no
    future: each of them would wake another thread, or contend for Python's lock.
    """

    def __init__(self, call: Callable[[T], R]) -> None:
        self._call = call
        self._work: SimpleQueue[tuple[int, T, SimpleQueue[tuple[int, R | BaseException]]] | None] = (
            SimpleQueue()
        )
        self._n_threads = 0

    def each(self, items: Sequence[T]) -> list[R]:
        """Return the result for each item, in order; not to be called by two threads at a time.

        An error is raised when all calls have ended.
        """
        if len(items) < 2:
            return [self._call(item) for item in items]
        self._start_threads(len(items) - 1)
        done: SimpleQueue[tuple[int, R | BaseException]] = SimpleQueue()
        for i, item in enumerate(items[1:], start=1):
            self._work.put((i, item, done))
        found = {0: _outcome(self._call, items[0])}
        found.update(done.get() for _ in items[1:])
        results: list[R] = []
        for i in range(len(items)):
            outcome = found[i]
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
        return results

    def close(self) -> None:
        """End the threads when they have made their calls."""
        for _ in range(self._n_threads):
            self._work.put(None)

    def _start_threads(self, n_needed: int) -> None:
        while self._n_threads < min(n_needed, _MOST_THREADS):
            self._n_threads += 1
            name = f"babeltower-call-{self._n_threads}"
            threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            i, item, done = work
            done.put((i, _outcome(self._call, item)))


def _outcome(call: Callable[[T], R], item: T) -> R | BaseException:
    try:
        return call(item)
    except BaseException as error:  # raised where all calls have ended
        return error
