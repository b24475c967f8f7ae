"""Subword vocabulary of a ``tokenizer.json``: its pieces, the pieces that others depend on, and a part of it.

A part segments a text exactly as the whole does if the whole's segmentation has only kept pieces. Two kinds
of models are supported, each under a condition that ``closed`` establishes:

- BPE merges the adjacent pair of lowest rank until no pair is left. If a piece is kept, so are both parts of
  every merge that makes it; then all merges behind kept pieces are kept, and the same pair is lowest at every
  step.
- Unigram takes the best path through all pieces in a text (Viterbi). Removing other paths leaves the best
  one the best, and the first of equals the first. Two things must not change: the single characters, as
  one without a piece gets an edge for the unknown token; and the lowest score, from which that edge's is
  computed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Subwords

from runtime.errors import ExportError

__all__ = ["Subvocabulary"]

_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True, slots=True)
class Subvocabulary:
    """Vocabulary of a tokenizer's file.

    Attributes:
        data: Decoded ``tokenizer.json``.
        pieces: Pieces of the model by id, without the added tokens that are not in it.
        added: Added tokens by id, such as ``<mask>`` and language tokens; some are pieces too.
    """

    data: Mapping[str, Any]
    pieces: Mapping[int, str]
    added: Mapping[int, str]

    @classmethod
    def from_json(cls, tokenizer_json: str) -> Subvocabulary:
        """Read a tokenizer's file.

        Raises:
            ExportError: its model is neither BPE nor Unigram, or has options that a part cannot keep.
        """
        data = json.loads(tokenizer_json)
        model = data["model"]
        match model.get("type"):
            case "BPE":
                for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
                    if model.get(option):
                        raise ExportError(
                            f"The tokenizer has {option} {model[option]!r}, with which its vocabulary cannot "
                            "be pruned. Export the whole vocabulary."
                        )
                pieces = {number: piece for piece, number in model["vocab"].items()}
            case "Unigram":
                pieces = {number: piece for number, (piece, _) in enumerate(model["vocab"])}
            case kind:
                raise ExportError(
                    f"A {kind} vocabulary cannot be pruned; BPE and Unigram ones can. Export it whole."
                )
        return cls(data, pieces, {token["id"]: token["content"] for token in data["added_tokens"]})

    @property
    def names(self) -> dict[int, str]:
        """Pieces and added tokens by id."""
        return {**self.pieces, **self.added}

    def fallbacks(self) -> set[int]:
        """Return the ids with which any text can be segmented: characters, bytes, the unknown token.

        For a Unigram model, one piece of the lowest score too; see the module's docstring.
        """
        model = self.data["model"]
        found = {number for number, piece in self.pieces.items() if len(piece) == 1 or piece in _BYTES}
        if model["type"] == "Unigram":
            unknown = model.get("unk_id")
            scores = [score for _, score in model["vocab"]]
            found.add(scores.index(min(scores)))
        else:
            unknown = model["vocab"].get(model.get("unk_token"))
        return found if unknown is None else found | {unknown}

    def closed(self, ids: Iterable[int]) -> set[int]:
        """Return the ids with the fallbacks, and with all pieces from which theirs are merged."""
        kept = {*ids, *self.fallbacks()}
        if self.data["model"]["type"] != "BPE":
            return kept
        id_of = {piece: number for number, piece in self.pieces.items()}
        parts: defaultdict[str, list[str]] = defaultdict(list)
        for left, right in self._merges():
            parts[left + right] += [left, right]
        todo = [self.pieces[number] for number in kept if number in self.pieces]
        while todo:
            for part in parts.get(todo.pop(), ()):
                if id_of[part] not in kept:
                    kept.add(id_of[part])
                    todo.append(part)
        return kept

    def part(self, kept: Sequence[int]) -> str:
        """Return the ``tokenizer.json`` of a part, whose ids are the positions in ``kept``.

        Args:
            kept: Ids in ascending order, the result of ``closed`` among them.

        Raises:
            ExportError: the tokenizers library reads other ids from it.
        """
        new = {old: position for position, old in enumerate(kept)}
        model = dict(self.data["model"])
        if model["type"] == "BPE":
            model["vocab"] = {
                piece: new[number] for number, piece in sorted(self.pieces.items()) if number in new
            }
            model["merges"] = [
                pair
                for pair, (left, right) in zip(model["merges"], self._merges(), strict=True)
                if {left, right, left + right} <= model["vocab"].keys()
            ]
        else:
            model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        added = [
            {**token, "id": new[token["id"]]} for token in self.data["added_tokens"] if token["id"] in new
        ]
        text = json.dumps({**self.data, "model": model, "added_tokens": added}, ensure_ascii=False)
        expected = {piece: new[number] for number, piece in self.names.items() if number in new}
        self._check(text, expected)
        return text

    def _merges(self) -> list[tuple[str, str]]:
        merges = self.data["model"]["merges"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
        return [(left, right) for left, right in pairs]

    @staticmethod
    def _check(text: str, expected: Mapping[str, int]) -> None:
        found = Subwords.from_str(text).get_vocab(with_added_tokens=True)
        differing: Collection[str] = [
            piece for piece in {*found, *expected} if found.get(piece) != expected.get(piece)
        ]
        if differing:
            piece = min(differing)
            raise ExportError(
                f"The pruned tokenizer gives {piece!r} the id {found.get(piece)}; expected "
                f"{expected.get(piece)}. Its ids have gaps, with which it cannot be pruned: export it whole."
            )
