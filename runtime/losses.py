"""Measured retrieval loss of a variant, and whether the variant may be chosen automatically."""

from __future__ import annotations

import math
from typing import Any

from runtime.manifest import Precision, Variant

__all__ = ["loss_in_words", "reason_against", "retrieval_loss_points"]


def retrieval_loss_points(variant: Variant, engine: str) -> float | None:
    """Return the R@1 points lost against PyTorch, averaged over languages, in the worse direction.

    Returns:
        ``None`` if it was not measured on the engine.
    """
    measured = _figures(variant, "retrieval", engine)
    try:
        means = measured["mean_recall_at_1"].values()
        losses = [100 * (float(m["reference"]) - float(m["exported"])) for m in means]
        return max(losses) if all(map(math.isfinite, losses)) else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def reason_against(variant: Variant, engine: str) -> str | None:
    """Return the reason not to choose a variant automatically; ``None`` if it may be chosen.

    FP32 is the baseline. Another precision needs a measured retrieval loss within the limits of its
    precision; a drop accepted at export does not count, since the user of the model did not accept it.
    """
    if variant.precision is Precision.FP32:
        return None
    limits = variant.parity.get("limits")
    loss = retrieval_loss_points(variant, engine)
    if loss is None or not isinstance(limits, dict):
        return "its retrieval loss was not measured"
    if limits.get("accepted_drop") is not None:
        return (
            f"it loses {loss:.2f} points of R@1, and was exported with an accepted drop of "
            f"{100 * float(limits['accepted_drop']):g} points"
        )
    try:
        limit = 100 * float(limits["retrieval"]["max_mean_drop"])
    except (KeyError, TypeError, ValueError):
        return "its manifest has no limit for its retrieval loss"
    if not loss <= limit:
        return f"it loses {loss:.2f} points of R@1, over the limit of {limit:g}"
    return None


def loss_in_words(variant: Variant, engine: str) -> str:
    """Describe the loss: ``loses 0.12 points of R@1 against PyTorch``, or that it was not measured."""
    loss = retrieval_loss_points(variant, engine)
    if loss is None:
        return "retrieval loss not measured"
    return f"loses {max(0.0, loss):.2f} points of R@1 against PyTorch"


def _figures(variant: Variant, part: str, engine: str) -> Any:
    """Return the figures of an engine; their keys are an engine and its version."""
    found = variant.parity.get(part)
    if isinstance(found, dict):
        for name, figures in found.items():
            if name.partition(" ")[0] == engine:
                return figures
    return None
