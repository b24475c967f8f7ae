"""Auto-tuning for ``babeltower tune``: maximise throughput within a latency limit.

Tower instances × threads, and front-end processes, queue delay, batch size and token budget are searched on a
real server under load; the best candidate is confirmed against the default before anything is written.
"""

from __future__ import annotations

from export.tuning.evidence import Tuning
from export.tuning.tune import TuneOptions, require_tunable, tuning_of_model

__all__ = ["TuneOptions", "Tuning", "require_tunable", "tuning_of_model"]
