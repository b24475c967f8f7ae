"""``babeltower tune``: the operation in which a server answers most requests within a latency.

Instances × threads of the tower, processes, queue delay, batch and token budget of the front end are searched
on a real server under load; the best is confirmed beside the default before anything is written.
"""

from __future__ import annotations

from export.tuning.evidence import Tuning
from export.tuning.tune import TuneOptions, tuning_of_model

__all__ = ["TuneOptions", "Tuning", "tuning_of_model"]
