"""Rollout of a new version of a served model: load beside the old one, probe, then switch or roll back.

gate.py       comparison of a server's probe answers with PyTorch's vectors
control.py    loading and unloading of models on the server
release.py    files of a version, written to a stage
kept.py       versions whose files are already in the repository
rollout.py    sequence of the rollout
settling.py   loading of what the files say, after a rollout or an interruption
"""

from __future__ import annotations

from runtime.rollout.control import Control
from runtime.rollout.rollout import Rollout, roll_out, undo_rollout
from runtime.rollout.settling import settle

__all__ = ["Control", "Rollout", "roll_out", "settle", "undo_rollout"]
