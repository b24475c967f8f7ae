"""Counts that callers pass."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.counts import require_count, require_threads
from runtime.errors import EngineError, InputError


@pytest.mark.parametrize("value", [1, 8, np.int64(8), 1024])
def test_whole_numbers_pass(value):
    assert require_count(value, "k") == value
    assert type(require_count(value, "k")) is int
    assert require_threads(value) == value


def test_no_number_of_threads_is_the_default():
    assert require_threads(None) is None


@pytest.mark.parametrize("value", ["8", 8.0, True, None, [8], 0, -1])
def test_other_values_are_named(value):
    with pytest.raises(InputError, match=r"k is .*; expected (a whole number|at least 1)\.") as refused:
        require_count(value, "k")
    assert repr(value) in str(refused.value)


def test_too_many_threads_are_refused():
    with pytest.raises(EngineError, match="threads is 1025; expected at most 1024"):
        require_threads(1025)
