"""The thread that a GPU's sessions share; no GPU is needed."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from runtime.backends.gpu_thread import GpuThread, _wait_out

GPU = 70
"""That no other test opens: a backend that was left open keeps its share, and so the thread."""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process in the background ignores interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_shares_of_a_gpu_are_one_thread_that_ends_with_the_last() -> None:
    one, other, second_gpu = GpuThread(GPU), GpuThread(GPU), GpuThread(GPU + 1)
    thread = one.call(threading.current_thread)
    assert thread is other.call(threading.current_thread)
    assert thread is not threading.current_thread()
    assert thread is not second_gpu.call(threading.current_thread)
    second_gpu.close()
    one.close()
    one.close()
    assert other.call(threading.current_thread) is thread
    other.close()
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="of GPU 70 was given back"):
        other.call(threading.current_thread)


def test_an_error_reaches_the_caller_and_leaves_the_thread() -> None:
    thread = GpuThread(GPU)
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 / 0)
    assert thread.call(lambda: 5) == 5
    thread.close()


def test_an_interrupt_is_raised_after_the_work(interruptible: None, monkeypatch: pytest.MonkeyPatch) -> None:
    main, waited, done = threading.main_thread(), threading.Event(), []

    def wait_out(ended: threading.Event) -> None:
        waited.set()
        _wait_out(ended)

    def work() -> None:
        ident = main.ident or 0
        while not waited.wait(0.05):  # a signal just before the wait is seen only when the wait ends
            if sys._current_frames()[ident].f_code is threading.Condition.wait.__code__:
                signal.pthread_kill(ident, signal.SIGINT)
        done.append("done")

    monkeypatch.setattr("runtime.backends.gpu_thread._wait_out", wait_out)
    thread = GpuThread(GPU)
    with pytest.raises(KeyboardInterrupt):
        thread.call(work)
    assert done == ["done"]
    assert thread.call(lambda: 5) == 5
    thread.close()
