"""One thread for each GPU, on which sessions of ONNX Runtime are opened, run and closed.

With CUDA graphs, ONNX Runtime lets one thread alone run a session: each thread would capture every shape
again, and keep its handles until the session ends. A capture also forbids other threads to allocate memory or
to open a session. Since all sessions of a GPU share a thread, none of them can disturb another's capture.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["GpuThread"]

T = TypeVar("T")


class GpuThread:
    """Share in the thread of one GPU; the thread ends when the last share is given back."""

    def __init__(self, index: int) -> None:
        self._index = index
        with _lock:
            executor, n_shares = _threads.get(index) or (_executor(index), 0)
            _threads[index] = executor, n_shares + 1
        self._executor: ThreadPoolExecutor | None = executor

    def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the thread, and return its result or raise its error.

        An interrupt of the caller is raised once the work has ended, since it uses the caller's memory; work
        that has not begun by then never begins.
        """
        if self._executor is None:
            raise RuntimeError(f"The share in the thread of GPU {self._index} was given back.")
        claim, ended = threading.Lock(), threading.Event()

        def claimed() -> T:
            if not claim.acquire(blocking=False):
                raise RuntimeError("The caller was interrupted before the work began.")
            try:
                return work()
            finally:
                ended.set()

        try:
            return self._executor.submit(claimed).result()
        except BaseException:
            if not claim.acquire(blocking=False):
                _wait_out(ended)
            raise

    def close(self) -> None:
        """Give the share back; a second time does nothing."""
        with _lock:
            if self._executor is None:
                return
            executor, n_shares = _threads[self._index]
            self._executor = None
            if n_shares > 1:
                _threads[self._index] = executor, n_shares - 1
                return
            del _threads[self._index]
        executor.shutdown()


_lock = threading.Lock()
_threads: dict[int, tuple[ThreadPoolExecutor, int]] = {}
"""GPU → its thread, and the number of shares in it."""


def _executor(index: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"babeltower-gpu-{index}")


def _wait_out(ended: threading.Event) -> None:
    while not ended.is_set():
        with contextlib.suppress(KeyboardInterrupt):  # the first one is raised afterwards
            ended.wait()
