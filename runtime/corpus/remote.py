"""Preparation of rows for a server: checked and batched here, tokenized and decoded on the server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.engines import EngineChoice
from runtime.corpus.pictures import PictureReader
from runtime.corpus.prepare import slices_of_images
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
from runtime.encoder import Encoder
from runtime.errors import CorpusError, ImageError, InputError
from runtime.manifest import Engine, Precision
from runtime.preprocessing.cleaning import whole_characters
from runtime.remote import Connection, RemoteEncoder, address_from_text
from runtime.remote.served_model import MostText

__all__ = ["RemoteImagePreparation", "RemoteTextPreparation", "open_remote"]

_TEXTS_PER_BATCH = 256
_REQUESTS_AT_ONCE = 4


def open_remote(
    model: str, choice: EngineChoice, connection: Connection | None = None
) -> tuple[RemoteEncoder, EngineChoice]:
    """Connect to a server and complete the choice with its engine and precision.

    Raises:
        CorpusError: threads or a device are given, which are set on the server.
        EngineError, ServerError: see ``Encoder.open``.
    """
    address_from_text(model)
    if choice.threads is not None:
        raise CorpusError(
            f"threads is {choice.threads}, but threads are set on the server; leave it out with an address."
        )
    if choice.device is not None:
        raise CorpusError(
            f"device is {choice.device}, but it is set on the server; leave it out with an address."
        )
    encoder = Encoder.open(model, engine=choice.engine, precision=choice.precision, connection=connection)
    if not isinstance(encoder, RemoteEncoder):
        raise CorpusError(f"{model} is not the address of a server.")
    served = encoder.served
    return encoder, replace(
        choice,
        engine=Engine(served.engine),
        precision=Precision(served.precision),
        instances=choice.instances or _REQUESTS_AT_ONCE,
    )


@dataclass(frozen=True, slots=True)
class _ServedTexts:
    texts: list[str]
    languages: list[str] | None
    rows: NDArray[np.int64]

    @property
    def counts(self) -> Counts:
        return Counts()

    def run(self, encoder: Any, dim: int) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = encoder.embed_texts(self.texts, self.languages, dim=dim)
        return vectors


class RemoteTextPreparation:
    """Preparation of texts, batched by length in characters, since tokens are counted on the server."""

    def __init__(self, encoder: Encoder, *, language: str | None) -> None:
        self._language = language
        self._most = encoder.served.most_text if isinstance(encoder, RemoteEncoder) else MostText()
        self._languages = LanguageCheck(lambda code: encoder.embed_texts(["a"], code))

    def shortened(self, rows: Iterator[Rows]) -> Iterator[Rows]:
        """Put problems in place of texts that the server refuses: where it cuts others is not known here."""
        for piece in rows:
            yield Rows(piece.start, piece.ids, list(map(self._sendable, piece.items)), piece.languages)

    def _sendable(self, item: Item) -> Item:
        if not isinstance(item, str):
            return item
        sizes = [(len(item), self._most.characters, "characters")]
        if self._most.n_bytes is not None and 4 * len(item) > self._most.n_bytes:
            sizes.append((len(item.encode("utf-8", "surrogatepass")), self._most.n_bytes, "bytes"))
        for size, most, unit in sizes:
            if most is not None and size > most:
                return Problem(
                    "too-long-text",
                    f"The text has {size:,} {unit}; the server takes {most:,} at most. Shorten it, or embed "
                    "with the model's folder, which cuts a text where its tokens end.",
                )
        return item

    def deduplicated(self, rows: Iterator[tuple[int, Rows]]) -> Iterator[Slice]:
        """Yield the slices unchanged; ``prepared`` finds duplicates."""
        return (Slice(part, piece) for part, piece in rows)

    def prepared(self, piece: Slice) -> PreparedSlice:
        """Check texts and languages, deduplicate, and batch by length."""
        rows = piece.rows
        codes = rows.languages or [None] * len(rows)
        vector_row = np.full(len(rows), BAD, dtype=np.int64)
        problems: dict[int, Problem] = {}
        first_of: dict[tuple[str, str | None], int] = {}
        for number, item, code in zip(range(rows.start, rows.stop), rows.items, codes, strict=True):
            language = self._language if code is None else code
            found = self._checked_text(item, language)
            if isinstance(found, Problem):
                problems[number] = found
            else:
                vector_row[number - rows.start] = first_of.setdefault((found, language), number)
        distinct = sorted(first_of.items(), key=lambda entry: -len(entry[0][0]))
        batches: list[Batch] = [
            _batch(distinct[at : at + _TEXTS_PER_BATCH]) for at in range(0, len(distinct), _TEXTS_PER_BATCH)
        ]
        n_duplicates = len(rows) - len(problems) - len(distinct)
        counts = Counts(len(rows), len(problems), n_duplicates)
        content = digest_of_rows(rows)
        return PreparedSlice(piece.part, rows.start, rows.ids, vector_row, problems, batches, counts, content)

    def _checked_text(self, item: Item, language: str | None) -> str | Problem:
        if isinstance(item, Problem):
            return item
        problem = self._languages.problem(language)
        if problem is not None:
            return problem
        try:
            return whole_characters(item, "The text")
        except InputError as error:
            return undecodable(item, error)


def _batch(entries: list[tuple[tuple[str, str | None], int]]) -> _ServedTexts:
    texts = [text for (text, _), _ in entries]
    codes = [code for (_, code), _ in entries]
    languages = None if None in codes else [code for code in codes if code is not None]
    return _ServedTexts(texts, languages, np.asarray([row for _, row in entries], dtype=np.int64))


@dataclass(frozen=True, slots=True)
class _ServedImages:
    images: list[Any]
    rows: NDArray[np.int64]

    @property
    def counts(self) -> Counts:
        return Counts(images=len(self.images))

    def run(self, encoder: Any, dim: int) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = encoder.embed_images(self.images, dim=dim)
        return vectors


class RemoteImagePreparation:
    """Preparation of images: decoded to find bad ones, sent as the original files."""

    def __init__(self, encoder: Encoder, reader: PictureReader) -> None:
        self._encoder = encoder
        self._reader = reader

    @staticmethod
    def shortened(rows: Iterator[Rows]) -> Iterator[Rows]:
        """Return the rows unchanged."""
        return rows

    def deduplicated(self, rows: Iterator[tuple[int, Rows]]) -> Iterator[Slice]:
        """Read the files and mark duplicates, as in process."""
        return slices_of_images(rows, self._reader)

    def prepared(self, piece: Slice) -> PreparedSlice:
        """Check the images that are not duplicates."""
        return prepared_images(piece, self._checked, _ServedImages)

    def _checked(self, number: int, item: Item) -> Any:
        if isinstance(item, Problem):
            return item
        try:
            return self._encoder.checked_image(item, name=f"of row {number}")
        except ImageError as error:
            return Problem("corrupt-image", str(error))
