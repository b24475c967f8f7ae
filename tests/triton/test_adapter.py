"""The front ends' calls of a tower on the same server: an answer must reach CPU memory."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pb_utils_double import TRITONSERVER_MEMORY_CPU, Behaviour, PbUtilsDouble, TritonModelException

from triton_models.answers import Code, TowerError
from triton_models.spec import TowerCall

TOWER = TowerCall("m_text_tower_fp16_tensorrt", 3, 32, 4, {"4": "vector"})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PbUtilsDouble]:
    double = PbUtilsDouble(Behaviour.GPU_UNLESS_ASKED)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", double)
    monkeypatch.delitem(sys.modules, "triton_models.adapter", raising=False)
    yield double
    sys.modules.pop("triton_models.adapter", None)


def answer() -> list[Any]:
    adapter = importlib.import_module("triton_models.adapter")
    ids = np.array([[1, 2], [3, 4]])
    return asyncio.run(adapter.TritonTower(TOWER)({"input_ids": ids}, ["vector"]))


def test_the_answer_of_a_tower_on_a_gpu_is_asked_for_in_cpu_memory(server: PbUtilsDouble) -> None:
    (vectors,) = answer()
    np.testing.assert_array_equal(vectors, [[3], [7]])
    (request,) = server.requests
    assert (request.model, request.version) == (TOWER.model, TOWER.version)
    assert request.memory.preferred_memory_type == TRITONSERVER_MEMORY_CPU


def test_an_answer_that_stays_on_the_gpu_is_a_clear_error(server: PbUtilsDouble) -> None:
    server.behaviour = Behaviour.GPU_ALWAYS
    with pytest.raises(TowerError, match=r"left output 'vector' in GPU memory .*requested") as error:
        answer()
    assert error.value.code is Code.INTERNAL


def test_the_double_s_tensors_behave_as_the_server_s(server: PbUtilsDouble) -> None:
    tensor = server.Tensor("vector", np.zeros(1), on_gpu=True)
    with pytest.raises(
        TritonModelException, match=r"^Tensor is stored in GPU and cannot be converted to NumPy\.$"
    ):
        tensor.as_numpy()


def test_a_busy_tower_is_unavailable(server: PbUtilsDouble) -> None:
    server.behaviour = Behaviour.FAILS
    with pytest.raises(TowerError, match="version 3, failed: the queue is full") as error:
        answer()
    assert error.value.code is Code.UNAVAILABLE
