"""The front ends' calls of a tower on the same server: an answer must reach CPU memory."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pb_utils_double import TRITONSERVER_MEMORY_CPU, Behaviour, PbUtilsDouble, TritonModelException

from triton_models.answers import Code, TowerError, TowerRun
from triton_models.spec import TowerCall

TOWER = TowerCall("m_text_tower_fp16_tensorrt", 3, 32, 4, {"4": "vector"})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PbUtilsDouble]:
    double = PbUtilsDouble(Behaviour.GPU_UNLESS_ASKED)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", double)
    monkeypatch.delitem(sys.modules, "triton_models.adapter", raising=False)
    yield double
    sys.modules.pop("triton_models.adapter", None)


def outcomes(n_runs: int = 1) -> list[Any]:
    adapter = importlib.import_module("triton_models.adapter")
    tower = adapter.TritonTower(TOWER)
    ids = np.array([[1, 2], [3, 4]])
    try:
        found: list[Any] = tower([TowerRun({"input_ids": ids + 10 * i}, ["vector"]) for i in range(n_runs)])
    finally:
        tower.close()
    return found


def test_the_answer_of_a_tower_on_a_gpu_is_asked_for_in_cpu_memory(server: PbUtilsDouble) -> None:
    ((vectors,),) = outcomes()
    np.testing.assert_array_equal(vectors, [[3], [7]])
    (request,) = server.requests
    assert (request.model, request.version) == (TOWER.model, TOWER.version)
    assert request.memory.preferred_memory_type == TRITONSERVER_MEMORY_CPU


def test_an_answer_that_stays_on_the_gpu_is_a_clear_error(server: PbUtilsDouble) -> None:
    server.behaviour = Behaviour.GPU_ALWAYS
    (error,) = outcomes()
    assert isinstance(error, TowerError)
    assert re.search(r"left output 'vector' in GPU memory .*requested", str(error))
    assert error.code is Code.INTERNAL


def test_the_double_s_tensors_behave_as_the_server_s(server: PbUtilsDouble) -> None:
    tensor = server.Tensor("vector", np.zeros(1), on_gpu=True)
    with pytest.raises(
        TritonModelException, match=r"^Tensor is stored in GPU and cannot be converted to NumPy\.$"
    ):
        tensor.as_numpy()


def test_a_busy_tower_is_unavailable(server: PbUtilsDouble) -> None:
    server.behaviour = Behaviour.FAILS
    (error,) = outcomes()
    assert isinstance(error, TowerError)
    assert "version 3, failed: the queue is full" in str(error)
    assert error.code is Code.UNAVAILABLE


def test_calls_made_together_are_answered_in_order(server: PbUtilsDouble) -> None:
    found = outcomes(12)
    assert [vectors[0].ravel().tolist() for vectors in found] == [[3 + 20 * i, 7 + 20 * i] for i in range(12)]
