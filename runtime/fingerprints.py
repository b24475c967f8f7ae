"""Fingerprints of embedding spaces: the kind of one, and sentences for refusals to compare two.

A fingerprint begins with its kind. ``bt2-`` covers what a model computes; ``bt1-``, the former kind, covered
its weights, tokenizer and preprocessing alone, so that equal ones do not prove that vectors may be compared
with those of a later export. Models and vectors of the former kind go on working with each other.
"""

from __future__ import annotations

__all__ = ["KIND", "is_former", "remark_on_kind", "remark_on_models", "remark_on_vectors"]

KIND = "bt2"
"""The kind that exports write."""

_LACKING = "of the former kind (bt1), which does not cover what a model computes"


def is_former(fingerprint: str) -> bool:
    """Tell whether a fingerprint was written before behaviour was covered."""
    return fingerprint.startswith("bt1-")


def remark_on_kind(fingerprint: str) -> str:
    """Remark for descriptions, after the fingerprint of a former kind; empty for one of today's."""
    return f" ({_LACKING}: make it again from a new export)" if is_former(fingerprint) else ""


def remark_on_vectors(vectors: str, model: str) -> str:
    """Sentence for a refusal of stored vectors under a model; empty unless one of them is of the former kind.

    Args:
        vectors: Fingerprint of the stored vectors.
        model: Fingerprint of the model that they are asked with.
    """
    if is_former(vectors) and not is_former(model):
        return (
            f" The fingerprint of the vectors is {_LACKING}: whether they are of the model's space cannot be "
            "told. Embed them again with this model, or ask them with the export that embedded them."
        )
    if is_former(model) and not is_former(vectors):
        return (
            f" The fingerprint of the model is {_LACKING}. Export its checkpoint again; where the new "
            "fingerprint is that of the vectors, they can stay as they are."
        )
    return ""


def remark_on_models(one: str, other: str) -> str:
    """Sentence for a refusal of two models; empty unless exactly one of them is of the former kind."""
    if is_former(one) == is_former(other):
        return ""
    former = one if is_former(one) else other
    return f" {former!r} is {_LACKING}: export that model's checkpoint again, then the two can be compared."
