"""Own cost and CPU times of the front ends' benchmark."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path

import pytest

from bench.records.turns import write_turns
from bench.serving.front_end_cost import (
    BEFORE,
    FRONT_END,
    WITH_TOWER,
    FrontEndCost,
    FrontEndTurn,
    cpu_us_of_processes,
)

TURN = FrontEndTurn(
    n_texts=100, seconds=0.5, n_batches=20, n_calls=20, front_us=100, server_us=50, tower_us=30, client_us=9
)


def turns(*front_us: float) -> list[FrontEndTurn]:
    return [dataclasses.replace(TURN, front_us=us) for us in front_us]


def test_the_own_cost_is_a_median_over_rounds() -> None:
    cost = FrontEndCost(
        {WITH_TOWER: turns(100, 300, 110), BEFORE: turns(400, 900, 430), FRONT_END: turns(190, 500, 220)}, 0.0
    )
    assert cost.own_us(WITH_TOWER) == 0
    assert cost.own_us(BEFORE) == 320
    assert cost.own_us(FRONT_END) == 110
    text = str(cost)
    assert "front end: 200 texts/s, 5.0 a batch, 1.0 calls a batch; CPU µs" in text
    assert "front end 220, 110 its own, server 50" in text
    assert TURN.all_us == 180


def test_a_record_has_every_turn_on_a_line(tmp_path: Path) -> None:
    write_turns(tmp_path / "record.json", "kind/1", {"clients": 2}, {"a": turns(1, 2), "b": turns(3)})
    text = (tmp_path / "record.json").read_text()
    found = json.loads(text)
    assert found["schema"] == "kind/1"
    assert found["clients"] == 2
    assert found["turns"] == {
        way: [dataclasses.asdict(turn) for turn in of_way]
        for way, of_way in {"a": turns(1, 2), "b": turns(3)}.items()
    }
    assert sum("front_us" in line for line in text.splitlines()) == 3


def test_cpu_time_has_that_of_ended_threads() -> None:
    def work() -> None:
        started = time.thread_time()
        while time.thread_time() - started < 0.1:
            pass

    before = cpu_us_of_processes([os.getpid()])
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert cpu_us_of_processes([os.getpid()]) - before >= 0.1e6
    assert cpu_us_of_processes([2**22 + 1]) == pytest.approx(0)
