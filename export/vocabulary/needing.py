"""Count the texts that need a token which a pruned vocabulary dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.parity.gate import GateReference
from export.towers import Towers

__all__ = ["texts_needing_dropped"]


def texts_needing_dropped(towers: Towers, gate: GateReference | None) -> Mapping[str, Any]:
    """Count the gate's texts by language, and those that need a dropped token; empty if none was dropped."""
    if towers.kept is None or gate is None:
        return {}
    found = {}
    for captions in gate.dataset.captions:
        texts = list(dict.fromkeys(captions.texts))
        ids = towers.reference.token_ids(texts, [captions.language] * len(texts))
        found[captions.code] = {
            "n_texts": len(texts),
            "n_needing": int((ids >= towers.n_tokens).any(axis=1).sum()),
        }
    return {gate.dataset.name: found}
