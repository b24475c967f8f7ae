"""Parity limits: the agreement with PyTorch that a variant needs to be published, by precision and engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from export.retrieval.verdict import RetrievalLimits
from runtime.manifest import GPU_ENGINES, Engine, Precision

__all__ = ["Limits", "limits_of"]

_TIE_MARGIN = 2e-6
"""Twice the rounding error of an FP32 score, a sum of about a thousand products of unit vectors."""

_GPU_TIE_MARGIN = 1e-5
"""Tie margin on a GPU, where a vector of the same text varies with the shape of its batch."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Parity limits of one precision on one kind of engine.

    Attributes:
        max_abs_error: Maximum error of any component of a probe's vector.
        min_cosine: Minimum cosine of any probe's vector with PyTorch's.
        max_pixel_error: Maximum pixel error on the scale 0 to 1.
        max_row_error: Maximum difference of any component between a text alone and in a batch.
        retrieval: Limits on retrieval, per language.
        accepted_drop: Recall drop, as a share, that the user accepted beyond the precision's own limits.
    """

    max_abs_error: float
    min_cosine: float
    max_pixel_error: float
    max_row_error: float
    retrieval: RetrievalLimits
    accepted_drop: float | None = None

    def accepting(self, drop: float) -> Limits:
        """Return limits that allow recall to drop by this share, in the mean and in every language."""
        retrieval = dataclasses.replace(
            self.retrieval,
            max_mean_drop=max(drop, self.retrieval.max_mean_drop),
            max_recall_drop=max(drop, self.retrieval.max_recall_drop),
            max_later_recall_drop=max(drop, self.retrieval.max_later_recall_drop),
        )
        return dataclasses.replace(self, retrieval=retrieval, accepted_drop=drop)

    def for_a_sample(self) -> Limits:
        """Return limits for a sample of the retrieval set's captions."""
        return dataclasses.replace(self, retrieval=dataclasses.replace(self.retrieval, sampled=True))


_PIXEL = 1 / 255

_ON_CPU: Mapping[Precision, Limits] = MappingProxyType(
    {
        Precision.FP32: Limits(
            1e-5, 0.999999, _PIXEL, 1e-5, RetrievalLimits(0.999999, 0.999999, 0, 0, 0, _TIE_MARGIN)
        ),
        Precision.FP16: Limits(
            0.02, 0.999, _PIXEL, 2e-3, RetrievalLimits(0.999, 0.9999, 0.015, 0.015, 0.001, _TIE_MARGIN)
        ),
        Precision.BF16: Limits(
            0.1, 0.98, _PIXEL, 0.02, RetrievalLimits(0.95, 0.998, 0.015, 0.015, 0.001, _TIE_MARGIN)
        ),
        Precision.INT8: Limits(
            0.3, 0.8, _PIXEL, 1e-6, RetrievalLimits(0.5, 0.98, 0.015, 0.02, 0.005, _TIE_MARGIN)
        ),
        Precision.FP8: Limits(
            0.3, 0.8, _PIXEL, 0.02, RetrievalLimits(0.5, 0.98, 0.015, 0.02, 0.005, _TIE_MARGIN)
        ),
    }
)
"""Limits on a CPU by precision, measured on the samples with a margin; those on recall are the guarantee. A
low precision changes a few short, rare texts considerably, but must not change a language's mean."""

_ROW_ERROR_ON_GPU: Mapping[Precision, float] = MappingProxyType(
    {
        Precision.FP32: 1e-5,
        Precision.FP16: 2e-3,
        Precision.BF16: 0.02,
        Precision.INT8: 0.02,
        Precision.FP8: 0.02,
    }
)
"""``max_row_error`` on a GPU. Kernels are chosen by the batch's shape, so a row alone and in a batch differ
by the precision's rounding. On a CPU, INT8 sums are integers, exact in any order; on a GPU, the rest of the
graph is FP16, and its rounding moves values across the borders of INT8 codes."""


def limits_of(precision: Precision, engine: Engine) -> Limits:
    """Return the parity limits of a precision on an engine."""
    limits = _ON_CPU[precision]
    if engine not in GPU_ENGINES:
        return limits
    retrieval = dataclasses.replace(limits.retrieval, tie_margin=_GPU_TIE_MARGIN)
    return dataclasses.replace(limits, max_row_error=_ROW_ERROR_ON_GPU[precision], retrieval=retrieval)
