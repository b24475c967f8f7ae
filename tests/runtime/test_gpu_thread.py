"""The thread that a GPU's sessions share; no GPU is needed."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from runtime.backends.gpu_thread import GpuThread, _wait_out

GPU = 70
"""That no other test opens: a backend that was left open keeps its share, and so the thread."""


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


def test_an_interrupt_is_raised_after_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    began, waited, done = threading.Event(), threading.Event(), []

    def interrupted(future: Future[None]) -> None:
        assert began.wait(60)
        raise KeyboardInterrupt

    def wait_out(ended: threading.Event) -> None:
        waited.set()
        _wait_out(ended)

    def work() -> None:
        began.set()
        assert waited.wait(60)
        done.append("done")

    thread = GpuThread(GPU)
    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        patched.setattr("runtime.backends.gpu_thread._wait_out", wait_out)
        with pytest.raises(KeyboardInterrupt):
            thread.call(work)
    assert done == ["done"]
    assert thread.call(lambda: 5) == 5
    thread.close()
