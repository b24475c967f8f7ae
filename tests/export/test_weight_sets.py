"""Files with more than one set of weights: nothing is dropped without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from export.weights.tensors import state_dict_from_file, without_wrappers
from runtime.errors import CheckpointError

STATE = {"visual.a": torch.ones(2, 2), "text.b": torch.zeros(3), "text.c": torch.full((2,), 3.0)}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    "saved",
    [
        {"model": STATE, "teacher": OTHER},
        {"state_dict": STATE, "ema_weights": OTHER},
        {"state_dict": STATE, "best_state_dict": OTHER},
        {"state_dict": STATE, "callbacks": {"EMACallback": {"ema_state_dict": OTHER}}},
        {"state_dict": STATE, "optimizer_states": [{"ema": list(OTHER.values())}]},
    ],
)
def test_a_second_set_of_weights_is_refused(saved: dict[str, Any], tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"another set of weights in|sets of weights"):
        state_dict_from_file(tmp_path / "x.pt")


def test_an_optimizer_is_no_set_of_weights(tmp_path: Path) -> None:
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": tensor} for i, tensor in enumerate(STATE.values())}
    saved = {"epoch": 3, "state_dict": STATE, "optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]}}
    torch.save(saved, tmp_path / "x.pt")
    assert state_dict_from_file(tmp_path / "x.pt").keys() == STATE.keys()


def test_a_wrapped_copy_must_be_the_same() -> None:
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in STATE.items()}
    origin = Path("x.pt")
    assert without_wrappers({**STATE, **wrapped}, "visual.", origin=origin).keys() == STATE.keys()
    other = {f"_orig_mod.{name}": tensor for name, tensor in OTHER.items()}
    with pytest.raises(CheckpointError, match="with different values"):
        without_wrappers({**STATE, **other}, "visual.", origin=origin)
