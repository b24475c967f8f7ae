"""What the soak counts as right, as refused, and as growing."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bench.records.memory_trend import trend_of_samples
from bench.serving.server_soak import SoakResult, _answered, _refused, own_bytes
from bench.timing.soak_requests import Request, bad_requests
from runtime.errors import BabeltowerError

MB = 1e6


def samples(slope: float, *, noise: float = 0.3, minutes: float = 12) -> list[tuple[float, float]]:
    """Memory that warms up to 500 MB, wanders, and grows by ``slope`` MB a minute; every 2 s."""
    random = np.random.default_rng(1)
    seconds = np.arange(0, minutes * 60, 2.0)
    wander = np.convolve(random.standard_normal(len(seconds)), np.ones(20) / 20, "same") * noise
    spikes = np.where(random.random(len(seconds)) < 0.05, 34, 0)  # a huge request in memory
    level = 500 - 60 * np.exp(-seconds / 30) + slope * seconds / 60 + wander + spikes
    return list(zip(seconds, level * MB, strict=True))


def test_a_leak_of_three_hundred_bytes_a_request_is_seen() -> None:
    leak = trend_of_samples(samples(0.3), skip=0.25)  # MB a minute: 1,000 requests
    assert leak.low > 0
    assert leak.low < 0.3 * MB < leak.high
    assert trend_of_samples(samples(2), skip=0.25).is_flat(0.01) is False


def test_flat_memory_is_flat_though_huge_requests_come_and_go() -> None:
    trend = trend_of_samples(samples(0), skip=0.25)
    assert trend.low < 0 < trend.high
    assert trend.is_flat(0.01)
    assert trend.minutes == pytest.approx(9, abs=0.1)
    assert trend.mean_bytes == pytest.approx(500 * MB, rel=0.01)


@pytest.mark.parametrize(("leak", "flat"), [(0.0, True), (0.6, False)])
def test_a_heap_that_stands_higher_for_a_while_neither_leaks_nor_hides_a_leak(
    leak: float, flat: bool
) -> None:
    def risen(at: float) -> bool:
        return any(begin <= at < begin + 80 for begin in (300, 440, 560))

    heap = [(at, n + 8 * MB * risen(at)) for at, n in samples(leak)]
    assert trend_of_samples(heap, skip=0.25).is_flat(0.01) is flat


def test_pages_of_files_do_not_count() -> None:
    rollup = "5-7 ---p 00 00:00 0 [rollup]\nPss: 90 kB\nPss_Anon: 30 kB\nPss_File: 55 kB\nPss_Shmem: 5 kB\n"
    assert own_bytes(rollup) == 35 * 1024


def test_too_few_samples_are_an_error() -> None:
    with pytest.raises(BabeltowerError, match="Measure for longer"):
        trend_of_samples(samples(0)[:20], skip=0.25)


def test_every_answer_is_counted_as_what_it_is() -> None:
    right = np.zeros(3, np.float32)
    good, bad = Request("m", {}, "text", right), Request("m", {}, "empty text")
    result = SoakResult(n_requests=6)
    _answered(result, good, right + np.float32(5e-7))
    _answered(result, good, right + np.float32(1e-3))
    _refused(result, bad, "StatusCode.INVALID_ARGUMENT", "InputError: text 0 is empty")
    _refused(result, bad, "StatusCode.INTERNAL", "boom")
    _answered(result, bad, right)
    result.memory = [(at, {"server": int(n)}) for at, n in samples(0)]
    result.processes_at_start, result.processes_at_end = [1, 2], [1, 3]
    assert (result.n_good, result.n_good_right, result.n_bad, result.n_bad_refused) == (2, 1, 3, 1)
    assert result.bad_kinds == {"empty text": 1}
    faults = "\n".join(result.faults())
    for fault in ("1 of 2 good", "2 of 3 bad", "1 requests without", "[1, 2] became [1, 3]", "boom"):
        assert fault in faults


def test_bad_requests_are_wrong_in_ways_of_their_own() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    bad = bad_requests("m", asks_language=True, image=file.getvalue())
    kinds = [request.kind for request in bad]
    assert len(set(kinds)) == len(kinds) >= 12
    for word in ("corrupt", "empty", "huge", "wrong type", "unknown language"):
        assert any(word in kind for kind in kinds), word
    assert all(request.expected is None for request in bad)
