"""Rates at saturation of one sample; load through a stand-in for the client; the curve of both."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sample_models import Exported

from bench.latency import groups_of_model
from bench.records.record import record_of, suite_cell
from bench.reporting.load_curve import draw_load_curve
from bench.throughput import Saturation, ServerLoad, measure_in_process, measure_server, sharings_of
from bench.timing import server_requests
from bench.timing.server_requests import open_loop
from runtime.errors import EngineError
from runtime.manifest import Engine, Modality

REQUESTS = [b"a", b"b", b"c"]


class SlowServer:
    """Answers one request at a time, each in two milliseconds."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.at_once = self.most = 0

    async def __aenter__(self) -> SlowServer:
        self.free = asyncio.Lock()
        return self

    async def __aexit__(self, *_: Any) -> None:
        pass

    def unary_unary(self, method: str) -> Any:
        return self.answer

    async def answer(self, request: bytes) -> None:
        self.asked.append(request)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        async with self.free:
            await asyncio.sleep(0.002)
        self.at_once -= 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> SlowServer:
    server = SlowServer()
    monkeypatch.setattr(server_requests, "_channel", lambda address: server)
    return server


def test_arrivals_do_not_wait_for_answers(server: SlowServer) -> None:
    latencies = open_loop("address", REQUESTS, per_s=5_000, n=40)
    assert server.most > 10
    assert sorted(server.asked) == sorted((REQUESTS * 14)[:40])
    # what waits counts from its arrival: the last one has waited for nearly all the others
    assert latencies[-1] > 0.5 * 2 * 40


def test_arrivals_keep_their_rate(server: SlowServer) -> None:
    started = time.perf_counter()
    latencies = open_loop("address", REQUESTS, per_s=100, n=40)
    assert time.perf_counter() - started > 0.15  # 40 arrivals, 100 a second
    assert latencies.shape == (40,)
    assert latencies.min() >= 2


def test_a_refused_request_ends_the_loop(monkeypatch: pytest.MonkeyPatch, server: SlowServer) -> None:
    import grpc

    async def refuse(request: bytes) -> None:
        metadata = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, metadata, metadata, details="out of memory")

    monkeypatch.setattr(server, "answer", refuse)
    with pytest.raises(EngineError, match="INTERNAL: out of memory"):
        open_loop("address", REQUESTS, per_s=100, n=2)


def test_a_sample_is_run_at_saturation(exported: Exported) -> None:
    groups = groups_of_model(exported("nllb-clip"), engines=[Engine.ONNXRUNTIME])
    plan = Saturation(batches=(2,), sharings=((2, 1), (1, 2)), processes=2, turns=1, seconds=0.02)
    records = measure_in_process(groups, plan, Console(quiet=True))
    assert {(r.cell["tower"], r.cell["load"]) for r in records} == {
        (tower, load) for tower in ("text", "image") for load in ("2×1", "1×2")
    }
    for record in records:
        assert record.error is None
        assert record.processes == (1, 1)
        assert min(record.samples) > 0
        assert record.settings["operations_per_run"] > 0


def test_a_missing_server_is_a_row_that_says_so(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "something").write_text("else")
    (record,) = measure_server(
        exported("nllb-clip"), tmp_path, ServerLoad(), Console(quiet=True), modalities=[Modality.TEXT]
    )
    assert "is not a Python environment" in (record.error or "")


@pytest.mark.parametrize(("n", "expected"), [(1, {(1, 1)}), (2, {(1, 2), (2, 1)}), (8, {(1, 8), (8, 1)})])
def test_cores_are_shared_out_whole(n: int, expected: set) -> None:
    assert set(sharings_of(n)) == expected


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_curve_is_drawn_where_there_are_arrivals(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"curve.{suffix}"
    draw_load_curve([], path)
    assert not path.exists()
    records = [
        record_of(
            suite_cell(suite="server", metric="wall", model="m", tower="text", load=f"open {share}%"),
            [1.0 + share, 2.0 + share, 30.0],
            unit="ms",
            settings={"offered_per_s": 10.0 * share},
        )
        for share in (25, 50, 90)
    ]
    draw_load_curve(records, path)
    assert path.stat().st_size > 5_000
