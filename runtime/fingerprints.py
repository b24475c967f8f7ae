"""Fingerprints of embedding spaces: their kinds, and remarks for errors about incomparable ones.

A fingerprint starts with its kind. ``bt2-`` covers what a model computes. The former ``bt1-`` covers only
weights, tokenizer and preprocessing, so equal ones do not prove that vectors are comparable with those of a
later export. Models and vectors of the former kind still work with each other.

A model whose vocabulary was pruned has the fingerprint of the whole model, ``+`` and a digest of the kept
tokens. Its vectors are in the whole model's space, and equal for every text that needs no dropped token; so
vectors of both are comparable, while their tokenizers, towers and corpora must not be mixed.
"""

from __future__ import annotations

__all__ = [
    "KIND",
    "is_former",
    "pruned_fingerprint",
    "remark_on_kind",
    "remark_on_models",
    "remark_on_vectors",
    "same_space",
]

KIND = "bt2"
"""Kind that exports write."""

_LACKING = "of the former kind (bt1), which does not cover what a model computes"


_PRUNED = "+"


def pruned_fingerprint(whole: str, digest: str) -> str:
    """Return the fingerprint of a model with a part of the vocabulary, from the whole model's."""
    return f"{whole}{_PRUNED}{digest}"


def same_space(one: str, other: str) -> bool:
    """Check whether vectors of two fingerprints are comparable: equal ones, but for pruned vocabularies."""
    return one.partition(_PRUNED)[0] == other.partition(_PRUNED)[0]


def is_former(fingerprint: str) -> bool:
    """Check whether a fingerprint is of the former kind, ``bt1``."""
    return fingerprint.startswith("bt1-")


def remark_on_kind(fingerprint: str) -> str:
    """Return a remark to show after a fingerprint of the former kind; empty for the current kind."""
    return f" ({_LACKING}: recreate it from a new export)" if is_former(fingerprint) else ""


def remark_on_vectors(vectors: str, model: str) -> str:
    """Return a remark for an error on vectors and a model; empty unless exactly one is of the former kind.

    Args:
        vectors: Fingerprint of the stored vectors.
        model: Fingerprint of the model that queries them.
    """
    if is_former(vectors) and not is_former(model):
        return (
            f" The fingerprint of the vectors is {_LACKING}, so it is unknown whether they are in the "
            "model's space. Embed them again with this model, or query them with the export that embedded "
            "them."
        )
    if is_former(model) and not is_former(vectors):
        return (
            f" The fingerprint of the model is {_LACKING}. Export its checkpoint again; if the new "
            "fingerprint equals that of the vectors, they can be kept."
        )
    return ""


def remark_on_models(one: str, other: str) -> str:
    """Return a remark for an error on two models; empty unless exactly one is of the former kind."""
    if is_former(one) == is_former(other):
        return ""
    former = one if is_former(one) else other
    return f" {former!r} is {_LACKING}: export that model's checkpoint again to compare the two."
