"""Towers with a part of their vocabulary, and their reference: the library with the whole vocabulary."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from export.towers import Float, Int, KeptTokens, Reference, Towers
from export.vocabulary.selection import VocabularyOptions, selection_for_towers
from export.vocabulary.subwords import Subvocabulary
from runtime.fingerprints import pruned_fingerprint
from runtime.manifest import PrunedVocabulary

__all__ = ["PrunedReference", "pruned_towers"]

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
    return dataclasses.replace(
        towers,
        tokenizer_json=vocabulary.part(rows.tolist()),
        text_preprocessing=dataclasses.replace(
            text,
            pad_id=new[text.pad_id],
            prefix_ids=tuple(new[number] for number in text.prefix_ids),
            suffix_ids=tuple(new[number] for number in text.suffix_ids),
            language_ids={code: new[text.language_ids[code]] for code in selection.languages}
            if text.language_ids
            else {},
            kept_languages=selection.languages,
        ),
        languages=selection.languages,
        reference=PrunedReference(towers.reference, rows),
        fingerprint=pruned_fingerprint(towers.fingerprint, digest),
        kept=KeptTokens(rows, towers, record),
    )


class PrunedReference:
    """A family's own library, unmodified, in the ids of a part of its vocabulary.

    A dropped token has an id too, from the number of kept tokens on, so that a text that needs one keeps the
    library's own vector: the gate measures what dropping costs.
    """

    def __init__(self, library: Reference, rows: Int) -> None:
        self.library, self.rows = library, rows

    def token_ids(self, texts: Sequence[str], languages: Sequence[str | None]) -> Int:
        """Tokenize with the library: int64 (texts, context); ids from ``len(rows)`` on are dropped tokens."""
        ids = self.library.token_ids(texts, languages)
        place = np.minimum(np.searchsorted(self.rows, ids), len(self.rows) - 1)
        found: Int = np.where(self.rows[place] == ids, place, ids + len(self.rows))
        return found

    def text_vectors(self, ids: Int) -> dict[int, Float]:
        """Embed padded ids of ``token_ids`` to unit float32 (texts, dim), keyed by dim."""
        n_kept = len(self.rows)
        whole = np.where(ids < n_kept, self.rows[np.minimum(ids, n_kept - 1)], ids - n_kept)
        return self.library.text_vectors(whole)

    def pixels(self, image: Image.Image) -> Float:
        """Preprocess an image with the library: normalised float32 (3, height, width)."""
        return self.library.pixels(image)

    def image_vectors(self, pixels: Float) -> dict[int, Float]:
        """Embed float32 pixels (images, 3, height, width) to unit float32 (images, dim), keyed by dim."""
        return self.library.image_vectors(pixels)

    def embed_texts(self, texts: Sequence[str], languages: Sequence[str | None]) -> Float:
        """Embed texts with the whole vocabulary, as a user of the library would."""
        return self.library.embed_texts(texts, languages)

    def embed_images(self, images: Sequence[Image.Image]) -> Float:
        """Embed images to unit float32 (images, dim), as a user of the library would."""
        return self.library.embed_images(images)
