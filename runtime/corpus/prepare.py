"""Preparation of rows into batches: tokenizing or decoding, deduplication, separation of bad rows.

The result for a slice depends only on its rows, never on timing or earlier work, so an interrupted run gives
the same vectors as an uninterrupted one.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.pictures import PictureReader
from runtime.corpus.rows import Item, Problem, Rows, undecodable
from runtime.corpus.slices import (
    BAD,
    Batch,
    Counts,
    LanguageCheck,
    PreparedSlice,
    Slice,
    digest_of_rows,
    prepared_images,
)
from runtime.corpus.sources.base import bounded_pieces
from runtime.errors import BabeltowerError, ImageError, InputError
from runtime.local import LocalEncoder
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing.batching import RUN_OVERHEAD, TokenBatch, runs_from_lengths
from runtime.preprocessing.buckets import text_buckets
from runtime.preprocessing.image import pixels_from_source
from runtime.preprocessing.text import Text

__all__ = ["ImagePreparation", "TextPreparation", "slices_of_images"]

_TOKENIZED_AT_ONCE = 4_096
_CHARACTERS_AT_ONCE = 1 << 20
"""Texts and characters that are tokenized at once: tokens take some 100 bytes each."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Concatenated rows of token ids: row ``i`` is ``ids[starts[i] : starts[i] + lengths[i]]``."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def batch(
        self, rows: NDArray[np.int64], positions: NDArray[np.int64], pad_id: int, *, length: int
    ) -> TokenBatch:
        lengths = self.lengths[rows]
        columns = np.arange(length)
        mask = columns < lengths[:, None]
        index = np.minimum(self.starts[rows][:, None] + columns, len(self.ids) - 1)
        ids = np.where(mask, self.ids[index], pad_id).astype(np.int64)
        return TokenBatch(positions, ids, mask.astype(np.int64), int(lengths.sum()))


@dataclass(frozen=True, slots=True)
class _TextBatch:
    """Text batch, padded only when it runs: token ids take a tenth of the memory of padded batches."""

    tokens: _Tokens
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    pad_id: int
    length: int

    @property
    def counts(self) -> Counts:
        lengths = self.tokens.lengths[self.positions]
        n_tokens, padded = int(lengths.sum()), len(lengths) * self.length
        return Counts(tokens=n_tokens, padding_tokens=padded - n_tokens)

    def run(self, encoder: Any, dim: int) -> NDArray[np.float32]:
        batch = self.tokens.batch(self.positions, self.rows, self.pad_id, length=self.length)
        vectors: NDArray[np.float32] = encoder.vectors_from_tokens(batch, dim=dim)
        return vectors


class TextPreparation:
    """Tokenizes a whole part and splits it into batches by length, as in-process calls are.

    Args:
        language: Language code of rows without one.
        max_batch_tokens: Rows × padded length of one batch. On a GPU, batches have the shapes of buckets.
    """

    def __init__(self, encoder: LocalEncoder, *, language: str | None, max_batch_tokens: int) -> None:
        self._encoder = encoder
        self._language = language
        self._max_batch_tokens = max_batch_tokens
        self._languages = LanguageCheck(lambda code: encoder.token_rows([Text("a", 0, code)]))

    def shortened(self, rows: Iterator[Rows]) -> Iterator[Rows]:
        """Cut texts that are longer than their tokens can come from; the token rows stay the same."""
        most = self._encoder.longest_kept_text
        for piece in rows:
            if not _are_texts_up_to(most, piece.items):
                items = [
                    self._encoder.shortened_text(item) if isinstance(item, str) and len(item) > most else item
                    for item in piece.items
                ]
                yield Rows(piece.start, piece.ids, items, piece.languages)
            else:
                yield piece

    def deduplicated(self, rows: Iterator[tuple[int, Rows]]) -> Iterator[Slice]:
        """Yield the slices unchanged; duplicates are found after tokenizing."""
        return (Slice(part, piece) for part, piece in rows)

    def prepared(self, piece: Slice) -> PreparedSlice:
        """Tokenize, deduplicate equal token rows and plan the batches."""
        rows = piece.rows
        texts, problems = self._texts(rows)
        vector_row = np.full(len(rows), BAD, dtype=np.int64)
        tokens, numbers, n_truncated = self._tokenized(texts, problems, vector_row, rows.start)
        n_good = int((vector_row != BAD).sum())
        counts = Counts(len(rows), len(problems), n_good - len(numbers), n_truncated)
        batches = self._batches(tokens, numbers) if len(numbers) else []
        content = digest_of_rows(rows)
        return PreparedSlice(piece.part, rows.start, rows.ids, vector_row, problems, batches, counts, content)

    def _texts(self, rows: Rows) -> tuple[list[Text], dict[int, Problem]]:
        """Return the texts that can be tokenized, and the problems of the other rows by their number."""
        if rows.languages is None and self._languages.problem(self._language) is None:
            numbered = list(enumerate(rows.items, rows.start))
            problems = {number: item for number, item in numbered if isinstance(item, Problem)}
            good = [(n, item) for n, item in numbered if n not in problems] if problems else numbered
            return [Text(item, number, self._language) for number, item in good], problems
        codes = rows.languages or [None] * len(rows)
        problems, texts = {}, []
        for number, item, code in zip(range(rows.start, rows.stop), rows.items, codes, strict=True):
            language = self._language if code is None else code
            problem = item if isinstance(item, Problem) else self._languages.problem(language)
            if problem is not None:
                problems[number] = problem
            else:
                texts.append(Text(item, number, language))
        return texts, problems

    def _tokenized(
        self, texts: list[Text], problems: dict[int, Problem], vector_row: NDArray[np.int64], start: int
    ) -> tuple[_Tokens, NDArray[np.int64], int]:
        """Return distinct token rows, the number of each one's first row, and the truncated rows."""
        first_of: dict[bytes, int] = {}
        numbers: list[int] = []
        firsts: list[int] = []
        n_truncated = 0
        for some in _tokenized_at_once(texts):
            for text, row in self._token_rows(some, problems):
                firsts.append(first_of.setdefault(array("i", row.ids).tobytes(), text.index))
                numbers.append(text.index)
                n_truncated += row.truncated
        vector_row[np.asarray(numbers, dtype=np.int64) - start] = firsts
        lengths = np.fromiter(map(len, first_of), np.int64, len(first_of)) // np.dtype(np.int32).itemsize
        starts = np.cumsum(lengths) - lengths
        flat = np.frombuffer(b"".join(first_of), dtype=np.int32)
        distinct = np.fromiter(first_of.values(), np.int64, len(first_of))
        return _Tokens(flat, starts, lengths), distinct, n_truncated

    def _token_rows(self, texts: list[Text], problems: dict[int, Problem]) -> Iterator[tuple[Text, Any]]:
        try:
            yield from zip(texts, self._encoder.token_rows(texts), strict=True)
        except InputError as error:
            if len(texts) == 1:
                problems[texts[0].index] = undecodable(texts[0].text, error)
                return
            half = len(texts) // 2
            yield from self._token_rows(texts[:half], problems)
            yield from self._token_rows(texts[half:], problems)

    def _batches(self, tokens: _Tokens, numbers: NDArray[np.int64]) -> list[Batch]:
        """Plan batches, longest rows first and equal lengths in row order."""
        pad_id = self._encoder.manifest.text.pad_id
        text, budget = self._encoder.manifest.text, self._max_batch_tokens
        if self._encoder.on_gpu:
            buckets = text_buckets(
                text.context_length,
                max_tokens=budget,
                exact_rows=self._encoder.exact_rows,
                packed=self._encoder.packs_text,
            )
            planned = [(run.positions, run.length) for run in buckets.runs(tokens.lengths)]
        else:
            runs = runs_from_lengths(tokens.lengths, max_tokens=budget, overhead=RUN_OVERHEAD)
            planned = [(positions, int(tokens.lengths[positions].max())) for positions in runs]
        return [_TextBatch(tokens, rows, numbers[rows], pad_id, length) for rows, length in planned]


def _are_texts_up_to(most: int, items: list[Item]) -> bool:
    """Check whether all items are texts of at most some characters."""
    return {*map(type, items)} <= {str} and max(map(len, items), default=0) <= most


def _tokenized_at_once(texts: list[Text]) -> Iterator[list[Text]]:
    for at in range(0, len(texts), _TOKENIZED_AT_ONCE):
        some = texts[at : at + _TOKENIZED_AT_ONCE]
        if sum(len(text.text) for text in some) <= _CHARACTERS_AT_ONCE:
            yield some
        else:
            yield from bounded_pieces(some, len(some), lambda text: len(text.text), _CHARACTERS_AT_ONCE)


@dataclass(frozen=True, slots=True)
class _ImageBatch:
    pixels: NDArray[np.uint8]
    rows: NDArray[np.int64]

    @property
    def counts(self) -> Counts:
        return Counts(images=len(self.pixels))

    def run(self, encoder: Any, dim: int) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = encoder.vectors_from_pixels(self.pixels, dim=dim)
        return vectors


class ImagePreparation:
    """Preparation of images, a few at a time; each slice is one batch."""

    def __init__(
        self, preprocessing: ImagePreprocessing, *, max_pixels: int | None, reader: PictureReader
    ) -> None:
        self._preprocessing = preprocessing
        self._max_pixels = max_pixels
        self._reader = reader

    @staticmethod
    def shortened(rows: Iterator[Rows]) -> Iterator[Rows]:
        """Return the rows unchanged."""
        return rows

    def deduplicated(self, rows: Iterator[tuple[int, Rows]]) -> Iterator[Slice]:
        """Read the files, and mark rows with the same bytes as an earlier row of their part."""
        return slices_of_images(rows, self._reader)

    def prepared(self, piece: Slice) -> PreparedSlice:
        """Decode and resize the images that are not duplicates."""
        return prepared_images(piece, self._pixels, lambda pixels, rows: _ImageBatch(np.stack(pixels), rows))

    def _pixels(self, number: int, item: Item) -> NDArray[np.uint8] | Problem:
        if isinstance(item, Problem):
            return item
        try:
            return pixels_from_source(
                item, self._preprocessing, name=f"of row {number}", max_pixels=self._max_pixels
            )
        except ImageError as error:
            return Problem("corrupt-image", str(error))
        except BabeltowerError as error:
            return Problem("not-image", str(error))


def slices_of_images(rows: Iterator[tuple[int, Rows]], reader: PictureReader) -> Iterator[Slice]:
    """Read the files of slices, and mark rows with the same bytes as an earlier row of their part."""
    seen: dict[bytes, int] = {}
    current = -1
    with reader.reading() as read:
        for part, piece in rows:
            if part != current:
                current, seen = part, {}
            found = read(piece.items)
            items = [item for item, _ in found]
            same_as = {}
            content = []
            for number, item in zip(range(piece.start, piece.stop), items, strict=True):
                content.append(_content(item))
                if isinstance(item, bytes):
                    first = seen.setdefault(content[-1], number)
                    if first != number:
                        same_as[number] = first
            pictures = tuple(picture for _, picture in found if picture is not None)
            rows_read = Rows(piece.start, piece.ids, items)
            yield Slice(part, rows_read, same_as, b"".join(content), pictures)


def _content(item: Item) -> bytes:
    """Return a hash of an image as it was read, or of the kind of the row's problem."""
    if isinstance(item, Problem):
        item = item.kind.encode()
    elif not isinstance(item, bytes):  # a snapshot of the caller's image
        item = pickle.dumps(item, protocol=5)
    return blake2b(item, digest_size=16).digest()
