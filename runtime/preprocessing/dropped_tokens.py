"""Tell which tokens of the whole vocabulary a text needs that a pruned one lacks."""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Subwords

from runtime.errors import ManifestError
from runtime.manifest import TextPreprocessing
from runtime.preprocessing.text import Text, cleaned_texts

__all__ = ["DroppedTokens"]


class DroppedTokens:
    """Comparison of texts' tokens in the checkpoint's own tokenizer with a pruned one's vocabulary.

    Args:
        whole: ``whole_tokenizer.json.gz`` beside a text tower.
        pruned: The tower's ``tokenizer.json``.

    Raises:
        ManifestError: a file cannot be read.
    """

    def __init__(
        self,
        whole: str | os.PathLike[str],
        pruned: str | os.PathLike[str],
        preprocessing: TextPreprocessing,
    ) -> None:
        try:
            text = gzip.decompress(Path(whole).read_bytes()).decode("utf-8")
            self._whole = Subwords.from_str(text)
            kept = Subwords.from_file(str(pruned)).get_vocab(with_added_tokens=True)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ManifestError(
                f"The tokenizers {whole} and {pruned} cannot be compared: {error}. Copy the repository "
                "again, or export the checkpoint again."
            ) from error
        self._whole.no_truncation()
        self._whole.no_padding()
        self._kept = {self._whole.token_to_id(piece) for piece in kept}
        self._preprocessing = preprocessing

    def of_texts(self, texts: Sequence[Text]) -> list[tuple[str, ...]]:
        """Return the dropped tokens that each text needs, in its order; tokens beyond the context length too.

        A text that needs none has the whole model's vector.

        Raises:
            InputError: a text holds a lone surrogate.
        """
        encodings = self._whole.encode_batch_fast(
            cleaned_texts(texts, self._preprocessing), add_special_tokens=False
        )
        return [
            tuple(str(self._whole.id_to_token(number)) for number in encoding.ids if number not in self._kept)
            for encoding in encodings
        ]
