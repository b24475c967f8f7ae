"""Samples of a tar: members grouped by key, links resolved, and samples that cannot be told apart as bad."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from tarfile import TarFile, TarInfo
from typing import Any

from runtime.corpus.reading import MOST_BYTES_AT_ONCE
from runtime.corpus.rows import Problem
from runtime.corpus.sources.cells import MOST_CHARACTERS
from runtime.corpus.sources.opened import SourceFiles
from runtime.corpus.sources.strict_tar import members_of_tar
from runtime.corpus.sources.tar_links import TarLinks
from runtime.preprocessing.image_formats import IMAGE_SUFFIXES

__all__ = ["IMAGE_EXTENSIONS", "Sample", "samples_of_tar"]

IMAGE_EXTENSIONS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


@dataclass(slots=True)
class Sample:
    """Members of one key that follow each other.

    Attributes:
        at: Position of the first member's header, in bytes.
        members: Extension in lower case → content, or the problem with it.
        problem: Why the sample as a whole is bad; ``None`` if it is not.
    """

    key: str
    at: int
    members: dict[str, bytes | Problem] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    problem: Problem | None = None

    def add(self, member: TarInfo, extension: str, content: bytes | Problem) -> None:
        """Add a member; a second one of the same extension makes the sample bad."""
        if extension not in self.members:
            self.members[extension], self.positions[extension] = content, member.offset
        elif self.problem is None:
            first = self.positions[extension]
            reason = (
                f"The tar holds {self.key}.{extension} twice, at bytes {first:,} and {member.offset:,}, so "
                "neither is taken. Remove one."
            )
            self.problem = Problem("ambiguous-sample", reason)

    def cells(self) -> dict[str, Any]:
        """Return the members and ``__key__``, ``image``, and the fields of a ``json`` member, by name."""
        images = [extension for extension in self.members if extension in IMAGE_EXTENSIONS]
        cells: dict[str, Any] = {**_fields(self.members.get("json")), **self.members, "__key__": self.key}
        if len(images) == 1:
            cells["image"] = self.members[images[0]]
        elif images:
            reason = f"The sample has several images: {images}. Choose one with --image {images[0]}."
            cells["image"] = Problem("ambiguous-sample", reason)
        return cells


def _fields(content: bytes | Problem | None) -> dict[str, Any]:
    if content is None or isinstance(content, Problem):
        return {}
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def samples_of_tar(files: SourceFiles, number: int, *, follow_links: bool = True) -> Iterator[Sample]:
    """Yield the samples of a tar, in its order.

    A link has the content of the member that it leads to. A device or pipe, and a link that leads out of the
    tar, are problems of their sample. Files without an extension, hidden ones, and folders that begin with
    ``__`` are left out, as by WebDataset.

    A sample is bad if a member of it is there twice, or if its key was there before: which of them counts
    cannot be known while a tar is read, and unpacking it keeps the last. Tars that follow each other in one
    file are told apart.

    Args:
        follow_links: Read what links lead to; otherwise only of ``json`` members, for their fields.

    Raises:
        DamagedFileError: the tar is cut off or damaged.
    """
    sample: Sample | None = None
    seen: dict[bytes, int] = {}
    current = 0
    with contextlib.ExitStack() as stack:
        links = stack.enter_context(contextlib.closing(TarLinks(files, number)))
        opened = stack.enter_context(files.decompressed(number, "a tar"))
        for member, tar, n_tars in members_of_tar(opened):
            named = _key_and_extension(member)
            if named is None:
                continue
            key, extension = named
            content: bytes | Problem | None = b""
            if follow_links or extension == "json" or not (member.islnk() or member.issym()):
                content = _content(member, n_tars, tar, extension, links)
            if content is None:  # a link to a folder
                continue
            if sample is None or sample.key != key or n_tars != current:
                if sample is not None:
                    yield sample
                if n_tars != current:
                    current, seen = n_tars, {}
                sample = Sample(key, member.offset)
                before = seen.setdefault(
                    blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), member.offset
                )
                if before != member.offset:
                    sample.problem = _repeated(key, before, member.offset)
            if member.isdev() and not extension:
                sample.problem = sample.problem or _not_a_file(member)
            else:
                sample.add(member, extension, content)
    if sample is not None:
        yield sample


def _repeated(key: str, before: int, at: int) -> Problem:
    return Problem(
        "ambiguous-sample",
        f"The tar holds the key {key!r} again at byte {at:,}; the sample at byte {before:,} is taken. "
        "Put the members of a sample next to each other, and remove what was replaced.",
    )


def _not_a_file(member: TarInfo) -> Problem:
    kind = "named pipe" if member.isfifo() else "device"
    return Problem("not-a-file", f"{member.name} is a {kind} and has no content.")


def _key_and_extension(member: TarInfo) -> tuple[str, str] | None:
    """Return the key and extension of a member; ``None`` for one that belongs to no sample."""
    folder, _, name = member.name.rpartition("/")
    stem, dot, extension = name.partition(".")
    is_left_out = not dot or not stem or folder.startswith("__")
    if member.isdir() or (is_left_out and not member.isdev()):
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _content(
    member: TarInfo, n_tars: int, tar: TarFile, extension: str, links: TarLinks
) -> bytes | Problem | None:
    """Return a member's content, the problem with it, or ``None`` for a link to a folder."""
    most = MOST_BYTES_AT_ONCE if extension in IMAGE_EXTENSIONS else MOST_CHARACTERS
    if member.isdev():
        return _not_a_file(member)
    if member.islnk() or member.issym():
        return links.content(member, n_tars, most)
    if member.size > most:
        reason = f"{member.name} has {member.size:,} bytes; at most {most:,} are read."
        return Problem("too-large-file", reason)
    opened = tar.extractfile(member)
    data = opened.read() if opened is not None else b""
    if len(data) != member.size:
        raise EOFError(f"the file is cut off in {member.name}")
    return data
