"""Lines of a text file, split many at a time: reading a short text must cost little beside its embedding."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from runtime.corpus.rows import Problem
from runtime.corpus.sources.base import PIECE_BYTES, PIECE_TEXTS
from runtime.corpus.sources.cells import MOST_CHARACTERS, too_long

__all__ = ["texts_of_lines"]

_READ_BYTES = 8_192
"""Bytes that are read at once; of a damaged file, no more than these are lost before the damage."""


@dataclass(slots=True)
class _OpenLine:
    """Beginning of a line whose end was not read yet; one that is too long is counted and not kept."""

    pieces: list[str] = field(default_factory=list)
    n_characters: int = 0

    def add(self, text: str) -> None:
        self.n_characters += len(text)
        if self.n_characters < MOST_CHARACTERS:
            self.pieces.append(text)
        else:
            self.pieces.clear()

    def ended(self) -> str | Problem:
        """Return the line, or its row's problem, and begin the next one."""
        pieces, n_characters = self.pieces, self.n_characters
        self.pieces, self.n_characters = [], 0
        return "".join(pieces) if n_characters < MOST_CHARACTERS else too_long(n_characters, "line")


def texts_of_lines(
    opened: Any, decoder: codecs.IncrementalDecoder, most: int = PIECE_TEXTS
) -> Iterator[list[str | Problem]]:
    """Yield lines without their ends, in lists of at most ``most``, of about 16 MB.

    Where the file is damaged, the whole lines before the damage are yielded first.

    Args:
        opened: Binary file with ``read``.
    """
    found: list[str | Problem] = []
    n_characters = 0
    line = _OpenLine()
    try:
        while True:
            data = opened.read(_READ_BYTES)
            text = decoder.decode(data, final=not data)
            first, *others = text.split("\n")
            line.add(first)
            if others:
                found.append(line.ended())
                line.add(others.pop())
                found += others
            n_characters += len(text)
            if len(found) >= most or n_characters >= PIECE_BYTES:
                yield from _lists(found, most)
                found, n_characters = [], 0
            if not data:
                break
    except Exception:
        yield from _lists(found, most)
        raise
    if line.n_characters:
        found.append(line.ended())
    yield from _lists(found, most)


def _lists(lines: list[str | Problem], most: int) -> Iterator[list[str | Problem]]:
    for at in range(0, len(lines), most):
        yield [line.rstrip("\r") if isinstance(line, str) else line for line in lines[at : at + most]]
