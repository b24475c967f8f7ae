"""Choose the tokens to keep for some languages, by their characters and by texts in them."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.precision.calibration import columns_of_parquet
from export.towers import Int, Towers
from export.vocabulary.characters import SOURCE, characters_of_languages, is_written_in
from export.vocabulary.subwords import Subvocabulary
from runtime.errors import DatasetError, ExportError, LanguageError
from runtime.manifest import TOKENIZER_FILE, KeptBy, TextPreprocessing
from runtime.preprocessing.languages import code_among, english_name, spoken_language
from runtime.preprocessing.text import Text, Tokenizer

__all__ = [
    "Selection",
    "VocabularyOptions",
    "languages_from_list",
    "selection_for_towers",
    "tokenizer_from_json",
]

_WINDOW = 4_096


@dataclass(frozen=True, slots=True)
class VocabularyOptions:
    """Request to keep only what texts in some languages need.

    Attributes:
        languages: FLORES-200 or BCP-47 codes, one at least.
        texts: Files with texts in these languages: Parquet with the columns ``text`` and, optionally,
            ``language``; or UTF-8 with one text per line.
        kept_by: Rule by which pieces are kept.
    """

    languages: tuple[str, ...]
    texts: tuple[Path, ...] = ()
    kept_by: KeptBy = KeptBy.CHARACTERS

    def __post_init__(self) -> None:
        if not self.languages:
            raise ExportError("No language to keep is named; name one at least, such as por,eng,spa.")
        if self.kept_by is KeptBy.TEXTS and not self.texts:
            raise ExportError(
                "The vocabulary is to be kept by texts, but no text is given. Pass --vocabulary-texts FILE, "
                "or keep it by characters."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Tokens to keep.

    Attributes:
        languages: FLORES-200 codes in the order of the tower's.
        rows: Kept ids, int64, ascending.
        sources: Origin of the choice, for the manifest.
    """

    languages: tuple[str, ...]
    rows: Int
    sources: dict[str, Any]


def languages_from_list(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of codes.

    Raises:
        LanguageError: an entry is empty.
    """
    codes = tuple(code.strip() for code in text.split(","))
    if not all(codes):
        raise LanguageError(f"{text!r} is not a list of languages; expected codes such as por,eng,spa.")
    return codes


def selection_for_towers(towers: Towers, vocabulary: Subvocabulary, options: VocabularyOptions) -> Selection:
    """Choose the ids to keep of a checkpoint's vocabulary.

    Special tokens, the tokens of the kept languages, all single characters and bytes are always kept, so that
    any text can be embedded.

    Raises:
        LanguageError: a language is unknown, or the tower does not support it.
        ExportError: CLDR has no characters for a language, and no text in it is given.
        DatasetError: a file of texts cannot be read, or has no text in the languages.
    """
    asked = {spoken_language(code, towers.languages) for code in options.languages}
    languages = tuple(code for code in towers.languages if code in asked)
    texts = [text for path in options.texts for text in _texts_of_file(path, languages)]
    characters = characters_of_languages(languages)
    spelled: set[int] = set()
    if options.kept_by is KeptBy.CHARACTERS:
        _require_characters(languages, characters, texts)
        alphabet = frozenset().union(*characters.values())
        spelled = {number for number, piece in vocabulary.pieces.items() if is_written_in(piece, alphabet)}
    used = _ids_of_texts(towers, [text for _, text in texts])
    dropped = {n for code, n in towers.text_preprocessing.language_ids.items() if code not in languages}
    kept = vocabulary.closed({*_special(towers, vocabulary), *spelled, *used} - dropped) - dropped
    sources: dict[str, Any] = {}
    if options.kept_by is KeptBy.CHARACTERS:
        sources["characters"] = SOURCE
    if options.texts:
        sources["texts"] = [_facts_of_file(path) for path in options.texts]
    return Selection(languages, np.array(sorted(kept), np.int64), sources)


def _special(towers: Towers, vocabulary: Subvocabulary) -> Iterator[int]:
    """Yield the ids that the preprocessing adds, the added tokens, and all ids up to the padding's.

    Positions count from the padding id, so that it must not change.
    """
    text = towers.text_preprocessing
    yield from (number for number in range(text.pad_id + 1) if number in vocabulary.names)
    yield from (*text.prefix_ids, *text.suffix_ids)
    yield from vocabulary.added


def _require_characters(
    languages: Sequence[str], characters: dict[str, frozenset[str]], texts: Sequence[tuple[str, str]]
) -> None:
    covered = {*characters, *(language for language, _ in texts)}
    if missing := [code for code in languages if code not in covered]:
        raise ExportError(
            f"CLDR has no characters for {english_name(missing[0])} ({missing[0]}), so its part of the "
            "vocabulary is unknown. Pass --vocabulary-texts FILE, a Parquet file with texts and a language "
            "column."
        )


def _texts_of_file(path: Path, languages: Sequence[str]) -> list[tuple[str, str]]:
    """Return the texts of a file in the languages, with their language, which is empty if not stated."""
    if path.suffix == ".parquet":
        columns = columns_of_parquet(path, ())
        if "text" not in columns:
            raise DatasetError(f"{path} has columns {sorted(columns)}; expected text, and perhaps language.")
        codes = columns.get("language") or [""] * len(columns["text"])
        pairs: Iterable[tuple[Any, Any]] = zip(codes, columns["text"], strict=True)
    else:
        try:
            pairs = [("", line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(
                f"{path} cannot be read as UTF-8 text, one text per line: {error}. Tables are read from "
                ".parquet files."
            ) from error
    found = [
        ((code_among(code, languages) or "") if code else "", text)
        for code, text in pairs
        if isinstance(text, str) and text.strip() and (not code or code_among(code, languages))
    ]
    if not found:
        raise DatasetError(f"{path} has no text in {', '.join(languages)}.")
    return found


def _facts_of_file(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _ids_of_texts(towers: Towers, texts: Sequence[str]) -> set[int]:
    """Return the whole vocabulary's ids in texts, of any length, cleaned as the runtime does."""
    if not texts:
        return set()
    # a language token is the same for all texts of a language, so that none is needed here
    preprocessing = dataclasses.replace(
        towers.text_preprocessing, context_length=1 << 30, language_ids={}, prefix_ids=(), suffix_ids=()
    )
    tokenizer = tokenizer_from_json(towers.tokenizer_json, preprocessing)
    found: set[int] = set()
    for start in range(0, len(texts), _WINDOW):
        window = [Text(text, start + i, None) for i, text in enumerate(texts[start : start + _WINDOW])]
        for row in tokenizer.rows_from_texts(window):
            found.update(row.ids)
    return found


def tokenizer_from_json(tokenizer_json: str, preprocessing: TextPreprocessing) -> Tokenizer:
    """Open a tokenizer as the runtime does, from the text of its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER_FILE
        path.write_text(tokenizer_json, encoding="utf-8")
        return Tokenizer(path, preprocessing)
