"""A new version of a served model: loaded beside the old one, asked the probes, switched to, or taken back.

gate.py       are a server's answers to the probes those of PyTorch?
control.py    the server's own control of its models
release.py    the files of a version in a repository, put in and taken out
kept.py       a version whose files are there already
rollout.py    the order of it all
"""

from __future__ import annotations

from runtime.rollout.rollout import Rollout, roll_out

__all__ = ["Rollout", "roll_out"]
