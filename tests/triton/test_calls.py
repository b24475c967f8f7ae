"""Several calls of a tower in flight together."""

from __future__ import annotations

import threading

import pytest

from triton_models.calls import ConcurrentCalls

_PATIENCE_S = 60


def test_calls_are_in_flight_together() -> None:
    together = threading.Barrier(5)
    calls: ConcurrentCalls[int, int] = ConcurrentCalls(lambda n: n * 10 + 0 * together.wait(_PATIENCE_S))
    assert calls.each(range(5)) == [0, 10, 20, 30, 40]
    calls.close()


def test_the_first_call_is_made_by_the_caller() -> None:
    calls: ConcurrentCalls[int, int] = ConcurrentCalls(lambda _: threading.get_ident())
    first, *others = calls.each(range(4))
    assert first == threading.get_ident()
    assert first not in others
    calls.close()


def test_more_calls_than_threads_are_all_made() -> None:
    calls: ConcurrentCalls[int, int] = ConcurrentCalls(lambda n: -n)
    for n in (0, 1, 100):
        assert calls.each(range(n)) == [-i for i in range(n)]
    calls.close()


def test_an_error_is_raised_when_all_calls_have_ended() -> None:
    ended: list[int] = []
    late = threading.Event()

    def call(n: int) -> int:
        if n == 0:
            threading.Timer(0.2, late.set).start()
            raise ValueError("the first fails at once")
        assert late.wait(_PATIENCE_S)
        ended.append(n)
        return n

    calls: ConcurrentCalls[int, int] = ConcurrentCalls(call)
    with pytest.raises(ValueError, match="the first fails at once"):
        calls.each([0, 1, 2])
    assert sorted(ended) == [1, 2]
    calls.close()


def test_threads_end_when_they_are_closed() -> None:
    calls: ConcurrentCalls[int, int] = ConcurrentCalls(lambda n: n)
    before = set(threading.enumerate())
    calls.each(range(4))
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert threads
    calls.close()
    for thread in threads:
        thread.join(_PATIENCE_S)
        assert not thread.is_alive()
