"""Tokenization of texts with languages to rows of token ids."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Subwords

from runtime.errors import InputError, LanguageError, ManifestError
from runtime.manifest import TextPreprocessing
from runtime.preprocessing.cleaning import (
    clean_canonicalize,
    clean_lower,
    clean_whitespace,
    whole_characters,
)
from runtime.preprocessing.languages import flores_from_code, spoken_language

__all__ = ["Text", "TokenRow", "Tokenizer", "require_texts", "texts_with_languages"]

_END = object()

_CLEAN: dict[str, Callable[[str], str]] = {
    "whitespace": clean_whitespace,
    "lower": clean_lower,
    "canonicalize": clean_canonicalize,
    "none": str,
}


@dataclass(frozen=True, slots=True)
class Text:
    """Text, its position in the caller's input, and its language code, if given."""

    text: str
    index: int
    language: str | None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids including special tokens, and padding where texts have a fixed length.

    ``truncated`` is true if the text exceeded the context length.
    """

    ids: list[int]
    truncated: bool


def texts_with_languages(texts: Iterable[str], language: str | Iterable[str] | None) -> Iterator[Text]:
    """Pair texts lazily with languages: one code for all, or one per text.

    Raises:
        InputError: ``texts`` is a single string or a table, an item is not a string, or the numbers of texts
            and languages differ.
    """
    require_texts(texts)
    if language is None or isinstance(language, str):
        return (_text(text, i, language) for i, text in enumerate(texts))
    if not isinstance(language, Iterable) or isinstance(language, (bytes, Set, Mapping)):
        raise LanguageError(
            f"language is of type {type(language).__name__}; expected one code, such as 'por_Latn', or a "
            "sequence with one code per text."
        )
    return _one_language_per_text(texts, language)


def require_texts(texts: Iterable[str]) -> None:
    """Check that several texts were passed: not one string, nor a table, whose names would be embedded.

    Raises:
        InputError: the argument is a string, a table or no iterable.
    """
    if isinstance(texts, (str, bytes)):
        raise InputError("texts is a single string; pass a list of strings, e.g. embed_texts([text]).")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise InputError(
            f"texts is a table of type {type(texts).__name__}; pass one of its columns, e.g. "
            "embed_texts(table['text']), or the table to runtime.corpus.embedded_batches."
        )
    if not isinstance(texts, Iterable):
        raise InputError(f"texts is of type {type(texts).__name__}; expected an iterable of strings.")


def _one_language_per_text(texts: Iterable[str], codes: Iterable[str]) -> Iterator[Text]:
    pairs = itertools.zip_longest(texts, codes, fillvalue=_END)
    for i, (text, code) in enumerate(pairs):
        if text is _END or code is _END:
            fewer, more = ("texts", "languages") if text is _END else ("languages", "texts")
            raise InputError(
                f"There are {i} {fewer} but more {more}. Pass one language for all texts, or one per text."
            )
        yield _text(text, i, code)


def _text(text: object, index: int, language: object) -> Text:
    if not isinstance(text, str):
        raise InputError(f"Text {index} is of type {type(text).__name__}; expected str.")
    if language is not None and not isinstance(language, str):
        raise LanguageError(
            f"The language of text {index} is of type {type(language).__name__}; expected a code such as "
            "'por_Latn'."
        )
    return Text(text, index, language)


class Tokenizer:
    """Tokenizer of one text tower: ``prefix or [language] + tokens + suffix``, as in its reference.

    Safe to use from several threads. ``default_language`` is used for texts without a language.

    Raises:
        ManifestError: the tokenizer's file cannot be read.
        LanguageError: the default language is not supported by the tower.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        preprocessing: TextPreprocessing,
        *,
        default_language: str | None = None,
    ) -> None:
        self._subwords = _subwords_from_file(Path(path))
        self._preprocessing = preprocessing
        self._clean = _CLEAN[preprocessing.clean]
        self._prefixes: dict[str | None, tuple[int, ...]] = {}
        self._default_language = default_language
        if default_language is not None:
            self._prefix(default_language)

    def require_language(self, text: Text) -> None:
        """Check a text's language before tokenizing.

        Raises:
            LanguageError: it is missing, unknown, or not supported by the tower.
        """
        self._prefix(text.language)

    def rows_from_texts(self, texts: Sequence[Text]) -> list[TokenRow]:
        """Tokenize texts, in input order.

        Raises:
            InputError: a text holds a lone surrogate.
            LanguageError: a language is missing, unknown, or not supported by the tower.
        """
        prefixes = [self._prefix(text.language) for text in texts]
        cleaned = [self._clean(whole_characters(text.text, f"Text {text.index}")) for text in texts]
        encodings = self._subwords.encode_batch_fast(cleaned, add_special_tokens=False)
        return [self._row(prefix, e.ids) for prefix, e in zip(prefixes, encodings, strict=True)]

    def _row(self, prefix: tuple[int, ...], tokens: list[int]) -> TokenRow:
        suffix = self._preprocessing.suffix_ids
        room = self._preprocessing.context_length - len(prefix) - len(suffix)
        ids = [*prefix, *tokens[:room], *suffix]
        if self._preprocessing.fixed_length:
            ids += [self._preprocessing.pad_id] * (self._preprocessing.context_length - len(ids))
        return TokenRow(ids, truncated=len(tokens) > room)

    def _prefix(self, language: str | None) -> tuple[int, ...]:
        try:
            return self._prefixes[language]
        except KeyError:
            prefix = self._new_prefix(language)
            self._prefixes[language] = prefix
            return prefix

    def _new_prefix(self, language: str | None) -> tuple[int, ...]:
        code = self._default_language if language is None else language
        if not self._preprocessing.needs_language:
            if code is not None:
                flores_from_code(code)
            return self._preprocessing.prefix_ids
        if code is None:
            raise LanguageError(
                "This text tower needs the language of every text. Pass language=..., e.g. "
                "language='por_Latn' or one code per text, or open the Encoder with default_language=...."
            )
        ids = self._preprocessing.language_ids
        return (ids[spoken_language(code, ids)],)


def _subwords_from_file(path: Path) -> Subwords:
    if not path.is_file():
        raise ManifestError(f"Tokenizer {path} is missing. Copy the repository again, or export again.")
    try:
        subwords = Subwords.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ManifestError(
            f"Tokenizer {path} cannot be read: {error}. Export the checkpoint again."
        ) from error
    subwords.no_truncation()
    subwords.no_padding()
    return subwords
