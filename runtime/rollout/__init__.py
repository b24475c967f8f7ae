"""Rollout of a new version of a served model: load beside the old one, probe, then switch or roll back.

gate.py       comparison of a server's probe answers with PyTorch's vectors
control.py    loading and unloading of models on the server
release.py    files of a version in a repository, added and removed
kept.py       versions whose files are already in the repository
rollout.py    sequence of the rollout
"""

from __future__ import annotations

from runtime.rollout.rollout import Rollout, roll_out

__all__ = ["Rollout", "roll_out"]
