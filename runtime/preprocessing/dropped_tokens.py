"""Tell which tokens of the whole vocabulary a text needs that a pruned one lacks."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Subwords

from runtime.errors import ManifestError
from runtime.manifest import WHOLE_TOKENIZER_FILE, TextPreprocessing
from runtime.preprocessing.text import cleaned_texts, texts_with_languages

__all__ = ["dropped_tokens_of"]


def dropped_tokens_of(
    tokenizer: Path, preprocessing: TextPreprocessing, texts: Iterable[str]
) -> list[tuple[str, ...]]:
    """Return the dropped tokens that each text needs, in its order; tokens beyond the context length too.

    A text that needs none has the whole model's vector.

    Args:
        tokenizer: A text tower's ``tokenizer.json``; the checkpoint's own is beside it.

    Raises:
        InputError: an input is not a text, or holds a lone surrogate.
        ManifestError: a tokenizer is missing, or cannot be read.
    """
    asked = [*texts_with_languages(texts, None)]
    path = tokenizer.with_name(WHOLE_TOKENIZER_FILE)
    try:
        whole = Subwords.from_str(gzip.decompress(path.read_bytes()).decode("utf-8"))
        pieces = Subwords.from_file(str(tokenizer)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ManifestError(
            f"The tokenizers {path} and {tokenizer.name} cannot be compared: {error}. Copy the repository "
            "again, or export the checkpoint again."
        ) from error
    whole.no_truncation()
    whole.no_padding()
    kept = {whole.token_to_id(piece) for piece in pieces}
    encodings = whole.encode_batch_fast(cleaned_texts(asked, preprocessing), add_special_tokens=False)
    return [
        tuple(str(whole.id_to_token(number)) for number in encoding.ids if number not in kept)
        for encoding in encodings
    ]
