"""Evaluate models with others' benchmarks: MTEB, and its image part MIEB."""

from runtime.evaluation.mteb_model import MtebModel

__all__ = ["MtebModel"]
