"""Tokenization of texts with languages to rows of token ids."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Subwords

from runtime.errors import InputError, LanguageError, ManifestError
from runtime.manifest import TextPreprocessing
from runtime.preprocessing.cleaning import (
    MOST_EXPANDED,
    clean_canonicalize,
    clean_lower,
    clean_whitespace,
    n_expanded,
    whole_characters,
)
from runtime.preprocessing.languages import flores_from_code, spoken_language

__all__ = [
    "NEEDS_LANGUAGE",
    "Text",
    "TokenRow",
    "Tokenizer",
    "cleaned_texts",
    "require_texts",
    "texts_with_languages",
]

NEEDS_LANGUAGE = "This text tower needs the language of every text."
"""Start of the message for a text without one; how to pass it differs between Python and HTTP."""

_END = object()

_CHARACTERS_AT_ONCE = 1 << 19
"""Characters tokenized at a time: tokens of a long text take sixty bytes a character until they are cut."""

_CHARACTERS_ALONE = 1_024
"""Characters that are tokenized text by text; a batch of texts wakes threads, which takes longer."""

_SHORTEST_CUT, _CHARACTERS_A_TOKEN = 1_024, 16
"""Where a long text is cut, in characters: most languages have 2 to 6 a token."""

_TOKENS_BEYOND = 32
"""Tokens between those of a row and the cut, beyond what a cut can change."""

_LONGEST_TOKEN = 64
"""Most beginnings of a text without spaces that are compared."""

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


def cleaned_texts(texts: Iterable[Text], preprocessing: TextPreprocessing) -> list[str]:
    """Clean texts as the reference tokenizer does.

    Raises:
        InputError: a text holds a lone surrogate.
    """
    clean = _CLEAN[preprocessing.clean]
    return [clean(whole_characters(text.text, f"Text {text.index}")) for text in texts]


class Tokenizer:
    """Tokenizer of one text tower: ``prefix or [language] + tokens + suffix``, as in its reference.

    Safe to use from several threads. ``default_language`` is used for texts without a language. After
    ``release``, the file is read again at the next use.

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
        self._path = Path(path)
        self._loaded: Subwords | None = _subwords_from_file(self._path)
        self._loading = threading.Lock()
        self._preprocessing = preprocessing
        self._prefixes: dict[str | None, tuple[int, ...]] = {}
        self._default_language = default_language
        if default_language is not None:
            self._prefix(default_language)

    @property
    def _subwords(self) -> Subwords:
        with self._loading:
            if self._loaded is None:
                self._loaded = _subwords_from_file(self._path)
            return self._loaded

    def release(self) -> None:
        """Give back the memory of the tokens until the next use; running calls keep theirs."""
        with self._loading:
            self._loaded = None

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
        cleaned = cleaned_texts(texts, self._preprocessing)
        rows = []
        for part in _parts_of_bounded_length(cleaned):
            tokens = self._tokens(cleaned[part])
            rows += [self._row(prefix, ids) for prefix, ids in zip(prefixes[part], tokens, strict=True)]
        return rows

    @property
    def longest_kept(self) -> int:
        """Length in characters above which ``shortened`` may cut a text."""
        return 2 * self._cut_at

    def shortened(self, text: str) -> str:
        """Return the beginning of a long text that gives the same token row, or the text itself.

        A text of a megabyte gives a hundred megabytes of tokens, of which a row keeps the first few dozen.
        The result is checked: its tokens are compared with those that the whole text is known to begin with.
        """
        if len(text) <= self.longest_kept:
            return text
        try:
            known = self._first_tokens(self._cleaned(text))
        except InputError:  # reported when the text is tokenized
            return text
        n = self._preprocessing.context_length
        for length in (self._cut_at, 2 * self._cut_at, 4 * self._cut_at):
            if known is None or length >= len(text):
                break
            beginning = text[: length - 1 if "\ud800" <= text[length - 1] <= "\udbff" else length]
            tokens = next(self._tokens([self._cleaned(beginning)]))
            if len(tokens) > n and tokens[:n] == known[:n]:
                return beginning
        return text

    def _first_tokens(self, cleaned: str) -> list[int] | None:
        """Return tokens that a long text begins with, as many as a row holds, from a part of it, or ``None``.

        Words are tokenized one by one, so tokens before a space do not depend on what follows it. Without a
        space, the tokens of a whole text begin with those of one of its beginnings that end within the length
        of the longest token before any place; if all of these begin alike, so does the whole.
        """
        at = self._cut_at
        if len(cleaned) <= at:
            return next(self._tokens([cleaned]))
        space = cleaned.rfind(" ", at // 2, at) if self._splits_words else -1
        ends = [space] if space > 0 else range(at - self._longest_token, at + 1)
        found = list(self._tokens([cleaned[:end] for end in ends]))
        enough = self._preprocessing.context_length + _TOKENS_BEYOND
        first = found[0][:enough]
        is_known = all(len(tokens) > enough for tokens in found)
        n = self._preprocessing.context_length
        return first if is_known and all(tokens[:n] == first[:n] for tokens in found) else None

    def _cleaned(self, text: str) -> str:
        return cleaned_texts([Text(text, 0, None)], self._preprocessing)[0]

    def _tokens(self, cleaned: Sequence[str]) -> Iterator[list[int]]:
        """Yield the tokens of each text; as Python's numbers, those of one text at a time take memory."""
        subwords = self._subwords
        if sum(map(len, cleaned)) <= _CHARACTERS_ALONE:
            for text in cleaned:
                yield subwords.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return
        for encoding in subwords.encode_batch_fast(list(cleaned), add_special_tokens=False):
            yield encoding.ids

    @property
    def _cut_at(self) -> int:
        return max(_SHORTEST_CUT, _CHARACTERS_A_TOKEN * self._preprocessing.context_length)

    @cached_property
    def _splits_words(self) -> bool:
        """Return True if words are tokenized one by one."""
        steps = json.loads(self._subwords.to_str())["pre_tokenizer"] or {}
        kinds = steps.get("pretokenizers", [steps])
        return any(
            kind.get("type") == "WhitespaceSplit"
            or (kind.get("type") == "Metaspace" and kind.get("split", True))
            for kind in kinds
        )

    @cached_property
    def _longest_token(self) -> int:
        return min(_LONGEST_TOKEN, max(map(len, self._subwords.get_vocab()), default=1))

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
                kept = self._preprocessing.kept_languages
                spoken_language(code, kept) if kept else flores_from_code(code)
            return self._preprocessing.prefix_ids
        if code is None:
            raise LanguageError(
                f"{NEEDS_LANGUAGE} Pass language=..., e.g. "
                "language='por_Latn' or one code per text, or open the Encoder with default_language=...."
            )
        ids = self._preprocessing.language_ids
        return (ids[spoken_language(code, ids)],)


def _parts_of_bounded_length(texts: Sequence[str]) -> Iterator[slice]:
    """Yield consecutive parts of about ``_CHARACTERS_AT_ONCE``, or of a single text."""
    if texts and MOST_EXPANDED * sum(map(len, texts)) <= _CHARACTERS_AT_ONCE:
        yield slice(0, len(texts))
        return
    start = n_characters = 0
    for i, text in enumerate(texts):
        length = n_expanded(text)
        if i > start and n_characters + length > _CHARACTERS_AT_ONCE:
            yield slice(start, i)
            start, n_characters = i, 0
        n_characters += length
    if start < len(texts):
        yield slice(start, len(texts))


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
