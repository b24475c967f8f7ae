"""Probes of the page: texts in every kept language, with the exported model's token ids and vectors."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.parity.probes import one_token_words, probe_texts
from export.towers import Float, Towers
from runtime.backends.backend import Backend
from runtime.preprocessing.batching import inputs_of_batch, padded_batch
from runtime.preprocessing.text import Tokenizer, texts_with_languages

__all__ = ["LEAST_COSINE", "MEAN_COSINE", "WebProbes", "is_read_alike", "vectors_of_rows", "web_probes"]

MEAN_COSINE = 0.999
"""Least mean cosine of the page's vectors with the exported model's, in the same precision."""

LEAST_COSINE = 0.99
"""Least cosine of a single text. Float kernels differ in the last bit, which turns the rounding of an INT8
activation in two texts of a thousand: in a tower 64 wide, one such code moved a vector by 0.002."""

_MOST_EMBEDDED = 12


@dataclass(frozen=True, slots=True, eq=False)
class WebProbes:
    """Texts with their token ids, and the vectors of some.

    Attributes:
        rows: One entry a text: text, language, ids and, if it is embedded, the row of ``vectors``.
        vectors: float32 (embedded texts, dim).
    """

    rows: Sequence[dict[str, Any]]
    vectors: Float

    @property
    def embedded(self) -> list[list[int]]:
        """Token ids of the embedded texts, in the order of ``vectors``."""
        return [row["ids"] for row in self.rows if "vector" in row]


def web_probes(
    towers: Towers, tokenizer: Tokenizer, text_tower: Backend, *, output: str, longest: int
) -> WebProbes:
    """Tokenize probe texts, and embed some, with the exported model.

    Args:
        longest: Characters of the longest text that the page takes.
    """
    probes = probe_texts(
        towers.text_preprocessing, per_language=1, words=one_token_words(towers.tokenizer_json)
    )
    probes = [one for one in probes if is_read_alike(one.text) and len(one.text) <= longest // 2]
    texts = texts_with_languages([one.text for one in probes], [one.language for one in probes])
    ids = [row.ids for row in tokenizer.rows_from_texts(list(texts))]
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(_MOST_EMBEDDED, len(ids))).astype(int)).tolist()
    place = {row: i for i, row in enumerate(chosen)}
    rows = [
        {
            "text": one.text,
            "language": one.language,
            "ids": ids[i],
            **({"vector": place[i]} if i in place else {}),
        }
        for i, one in enumerate(probes)
    ]
    return WebProbes(rows, vectors_of_rows(text_tower, towers, [ids[row] for row in chosen], output))


def is_read_alike(text: str) -> bool:
    """Return True if the page cleans a text as the runtime does; of any other it says that it does not."""
    import ftfy

    return html.unescape(text) == text and ftfy.fix_encoding(text) == text


def vectors_of_rows(tower: Backend, towers: Towers, rows: Sequence[Sequence[int]], output: str) -> Float:
    """Embed rows of token ids, one a run as the page does: float32 (rows, dim)."""
    text = towers.text_preprocessing
    runs = (padded_batch(rows, [i], pad_id=text.pad_id) for i in range(len(rows)))
    return np.concatenate([tower.run(inputs_of_batch(run, text.graph_inputs), [output])[0] for run in runs])
