"""Functions measured in a process that imports their module only."""

from __future__ import annotations

import sys

import pytest

from bench.timing.lean_process import called_alone
from runtime.errors import BabeltowerError

WITHOUT_TORCH = 150e6
"""Bytes: torch alone takes 400 MB."""


def test_nothing_of_the_calling_process_is_imported() -> None:
    import torch

    assert torch.__name__ in sys.modules
    assert 1e6 < called_alone("bench.timing.immich_queries", "resident_bytes") < WITHOUT_TORCH


def test_arguments_and_results_are_json() -> None:
    assert called_alone("posixpath", "join", "a", "b") == "a/b"


def test_a_failure_says_why() -> None:
    with pytest.raises(BabeltowerError, match=r"(?s)posixpath\.join.* failed: .*TypeError"):
        called_alone("posixpath", "join", 1)
