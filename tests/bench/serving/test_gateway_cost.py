"""Shares and CPU times of the gateway's cost."""

from __future__ import annotations

import os
import time

import pytest

from bench.serving.gateway_cost import GRPC, CostTurn, GatewayCost, cpu_s_of_processes


def test_shares_are_medians_over_rounds() -> None:
    raw = [
        CostTurn(100, 1.0, 8.0, 0.0, 1.0),
        CostTurn(100, 2.0, 8.0, 0.0, 1.0),
        CostTurn(90, 1.0, 8.0, 0.0, 1.0),
    ]
    way = [
        CostTurn(90, 1.0, 8.0, 2.0, 1.0),
        CostTurn(80, 2.0, 8.0, 8.0, 1.0),
        CostTurn(90, 1.0, 8.0, 2.0, 9.0),
    ]
    cost = GatewayCost({GRPC: raw, "other": way})
    assert cost.rate_share(GRPC) == cost.cpu_share(GRPC) == 1
    assert cost.rate_share("other") == pytest.approx(0.9)
    assert cost.cpu_share("other") == pytest.approx(0.8)
    assert "other: 90 texts/s (90% of gRPC's)" in str(cost)


def test_cpu_time_is_of_running_processes() -> None:
    before, own = cpu_s_of_processes([os.getpid()]), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    assert cpu_s_of_processes([os.getpid()]) - before >= 0.15
    assert cpu_s_of_processes([2**22 + 1]) == 0
