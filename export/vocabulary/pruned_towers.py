"""Towers with a part of their vocabulary, and their reference: the library with the whole vocabulary."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.towers import Float, Int, KeptTokens, Reference, Towers
from export.vocabulary.selection import VocabularyOptions, selection_for_towers, tokenizer_from_json
from export.vocabulary.subwords import Subvocabulary
from runtime.fingerprints import pruned_fingerprint
from runtime.manifest import PrunedVocabulary
from runtime.preprocessing.text import Text, Tokenizer

__all__ = ["PrunedReference", "pruned_towers"]

_BATCH = 32
_DIGEST_LENGTH = 12


def pruned_towers(towers: Towers, options: VocabularyOptions) -> Towers:
    """Return towers whose tokenizer, ids, languages and fingerprint are those of a part of the vocabulary.

    Raises:
        ExportError: the tokenizer's kind is not supported, or a language's part is unknown.
        LanguageError: a language is unknown, or the tower does not support it.
        DatasetError: a file of texts cannot be read, or has no text in the languages.
    """
    vocabulary = Subvocabulary.from_json(towers.tokenizer_json)
    selection = selection_for_towers(towers, vocabulary, options)
    rows = selection.rows
    new = {int(old): position for position, old in enumerate(rows)}
    text = towers.text_preprocessing
    record = PrunedVocabulary(
        languages=selection.languages,
        kept_by=options.kept_by,
        n_tokens=len(rows),
        n_whole=towers.n_tokens,
        whole_fingerprint=towers.fingerprint,
        sources=selection.sources,
        needing={},
    )
    digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:_DIGEST_LENGTH]
    tokenizer_json = vocabulary.part(rows.tolist())
    preprocessing = dataclasses.replace(
        text,
        pad_id=new[text.pad_id],
        prefix_ids=tuple(new[number] for number in text.prefix_ids),
        suffix_ids=tuple(new[number] for number in text.suffix_ids),
        language_ids={code: new[text.language_ids[code]] for code in selection.languages}
        if text.language_ids
        else {},
        kept_languages=selection.languages,
    )
    return dataclasses.replace(
        towers,
        tokenizer_json=tokenizer_json,
        text_preprocessing=preprocessing,
        languages=selection.languages,
        reference=PrunedReference(
            towers.reference, rows, tokenizer_from_json(tokenizer_json, preprocessing), preprocessing.pad_id
        ),
        fingerprint=pruned_fingerprint(towers.fingerprint, digest),
        kept=KeptTokens(rows, towers, record),
    )


class PrunedReference:
    """A family's own library, unmodified, in the ids of a part of its vocabulary.

    Token ids are the library's, where all are kept. A text that needs a dropped token is segmented by the
    pruned tokenizer, as no library knows that part; its vector is the library's of those tokens.
    """

    def __init__(self, library: Reference, rows: Int, tokenizer: Tokenizer, pad_id: int) -> None:
        self.library, self.rows, self.tokenizer, self.pad_id = library, rows, tokenizer, pad_id

    def token_ids(self, texts: Sequence[str], languages: Sequence[str | None]) -> Int:
        """Tokenize to int64 (texts, context length)."""
        ids, is_kept = self._kept_ids(texts, languages)
        for row in np.flatnonzero(~is_kept.all(axis=1)).tolist():
            (own,) = self.tokenizer.rows_from_texts([Text(texts[row], row, languages[row])])
            ids[row] = self.pad_id
            ids[row, : len(own.ids)] = own.ids
        return ids

    def needs_dropped(self, texts: Sequence[str], languages: Sequence[str | None]) -> NDArray[np.bool_]:
        """Mark the texts that need a dropped token within the context length, bool (texts,)."""
        _, is_kept = self._kept_ids(texts, languages)
        found: NDArray[np.bool_] = np.logical_not(np.all(is_kept, axis=1))
        return found

    def _kept_ids(
        self, texts: Sequence[str], languages: Sequence[str | None]
    ) -> tuple[Int, NDArray[np.bool_]]:
        """Return the library's ids, renumbered, and a mark of those that are kept."""
        ids = self.library.token_ids(texts, languages)
        place = np.minimum(np.searchsorted(self.rows, ids), len(self.rows) - 1)
        return place.astype(np.int64), self.rows[place] == ids

    def text_vectors(self, ids: Int) -> dict[int, Float]:
        """Embed padded int64 ids (texts, any length) to unit float32 (texts, dim), keyed by dim."""
        return self.library.text_vectors(self.rows[ids])

    def pixels(self, image: Image.Image) -> Float:
        """Preprocess an image with the library: normalised float32 (3, height, width)."""
        return self.library.pixels(image)

    def image_vectors(self, pixels: Float) -> dict[int, Float]:
        """Embed float32 pixels (images, 3, height, width) to unit float32 (images, dim), keyed by dim."""
        return self.library.image_vectors(pixels)

    def embed_texts(self, texts: Sequence[str], languages: Sequence[str | None]) -> Float:
        """Embed texts with the kept part of the vocabulary to unit float32 (texts, dim)."""
        batches = [
            self.text_vectors(self.token_ids(texts[i : i + _BATCH], languages[i : i + _BATCH]))
            for i in range(0, len(texts), _BATCH)
        ]
        return np.concatenate([batch[max(batch)] for batch in batches])

    def embed_images(self, images: Sequence[Image.Image]) -> Float:
        """Embed images to unit float32 (images, dim), as a user of the library would."""
        return self.library.embed_images(images)
