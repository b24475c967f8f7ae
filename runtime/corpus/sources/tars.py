"""WebDataset tars: files with the same name up to the first dot form one sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from runtime.corpus.files import FileSet
from runtime.corpus.locations import partitions_of
from runtime.corpus.reading import MOST_BYTES_AT_ONCE
from runtime.corpus.rows import Columns, IdType, Needs, Problem, Rows
from runtime.corpus.sources.base import (
    PIECE_IMAGES,
    Reading,
    SourceFormat,
    bounded_pieces,
    chosen_columns,
    has_column,
    modality_of,
)
from runtime.corpus.sources.cells import MOST_CHARACTERS, value_at
from runtime.corpus.sources.opened import SourceFiles
from runtime.corpus.sources.records import Cells
from runtime.corpus.sources.strict_tar import members_of_tar
from runtime.errors import DamagedFileError, InputError
from runtime.manifest import Modality
from runtime.preprocessing.image_formats import IMAGE_SUFFIXES

__all__ = ["TarSource"]

_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_SAMPLES = 16
"""Samples of each tar that are looked at before any work; of a single tar, four times as many."""


class TarSource:
    """Samples in tar order, with columns ``__key__``, the files' extensions, ``image`` for the first image
    of any extension, and the fields of a ``json`` file.

    Raises:
        InputError: a tar cannot be read, or columns are missing or ambiguous.
    """

    def __init__(self, name: str, files: FileSet, columns: Columns, reading: Reading) -> None:
        self._files = SourceFiles(name, files, reading, what="tar files")
        self.name, self.format, self.id_type = name, SourceFormat.WEBDATASET, IdType.STRING
        n_samples = _SAMPLES if len(files.files) > 1 else 4 * _SAMPLES
        heads = self._files.looked_at(lambda file: self._head(file, n_samples))
        self.files, self.patience, self.bad_files = self._files.all, self._files.patience, self._files.bad
        self.notes, self.n_files = self._files.notes, len(self._files)
        names = list(dict.fromkeys(key for head in heads.values() for key in head))
        if not names:
            raise InputError(f"{self._files[0].shown} holds no samples.")
        self._texts_by_guess = columns.text is None and columns.image is None and "image" not in names
        if columns.text is None and columns.image is None and "image" in names:
            columns = Columns(columns.id, None, "image", columns.language)  # the image of a captioned image
            self.notes.append("samples hold images, so images are embedded; --text txt embeds their captions")
        if columns.id is None:
            columns = Columns("__key__", columns.text, columns.image, columns.language)
        self.columns = chosen_columns(columns, {self._files[0].shown: names})
        if self.columns.id is None:
            self.id_type = IdType.INT64
        self.modality = modality_of(self.columns)
        item = self.columns.text or self.columns.image or ""
        for number, head in heads.items():
            if head and not has_column(list(head), item):
                raise InputError(
                    f"{self._files[number].shown} has no {item!r} in its first {n_samples} samples; it has "
                    f"{sorted(head)}. Pass tars of one kind, or another --text or --image."
                )

    def _head(self, file: int, n_samples: int) -> list[str]:
        """Return the columns of a tar's first samples."""
        names: dict[str, None] = {}
        try:
            for sample in islice(self._samples(file), n_samples):
                names.update(dict.fromkeys(sample))
        except DamagedFileError:
            if not names or not self._files.reading.skip_bad_files:
                raise  # otherwise the samples before the damage are read
        return list(names)

    def identity(self) -> str:
        """Return a hash of file names and sizes."""
        return self._files.identity()

    def n_rows(self, file: int) -> None:
        """Return ``None``: the number is unknown until the tar is read."""

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield all samples of a tar as rows.

        Raises:
            DamagedFileError: the tar is cut off or damaged.
        """
        return self._files.to_proven_end(file, self._read(file))

    def _read(self, file: int) -> Iterator[Rows]:
        columns = self.columns
        item = columns.text or columns.image or ""
        opened = self._files[file]
        reading = self._files.reading
        cells = Cells(columns, self.id_type, opened.filesystem, opened.folder, reading.captions)
        start = 0
        for samples in bounded_pieces(self._samples(file), PIECE_IMAGES, _size):
            self._require_no_image(opened.shown, samples)
            rows = cells.rows(
                start,
                None if columns.id is None else [_id(sample, columns.id) for sample in samples],
                [_cell(sample, item) for sample in samples],
                None if columns.language is None else [_code(s, columns.language) for s in samples],
            )
            yield rows
            start = rows.stop

    def _require_no_image(self, where: str, samples: Sequence[dict[str, Any]]) -> None:
        """Check that no image turns up where texts were chosen because the first samples had none."""
        if not self._texts_by_guess or self.modality is not Modality.TEXT:
            return
        found = next((sample for sample in samples if "image" in sample), None)
        if found is not None:
            raise InputError(
                f"{where}: sample {found['__key__']!r} has an image, and the first samples had none, so that "
                f"texts would be embedded. Pass --text {self.columns.text} or --image image."
            )

    def _samples(self, file: int) -> Iterator[dict[str, Any]]:
        partitions = partitions_of(self._files[file].name)
        sample: dict[str, Any] = {}
        extensions: set[str] = set()
        with self._files.decompressed(file, "a tar") as opened:
            for member, tar in members_of_tar(opened):
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                is_link = member.issym() or member.islnk()
                if not (member.isfile() or is_link) or not dot or not stem or folder.startswith("__"):
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if sample and sample["__key__"] != key:
                    yield {**partitions, **sample}
                    sample, extensions = {}, set()
                sample["__key__"], extension = key, extension.lower()
                if is_link:
                    reason = f"{member.name} is a link to {member.linkname}; links in tars are not followed."
                    _add(sample, extension, Problem("link-in-tar", reason))
                    continue
                if extension in extensions:
                    reason = f"The sample {key} has two files with the suffix .{extension}."
                    _replace(sample, extension, Problem("duplicate-file", reason))
                    continue
                extensions.add(extension)
                most = MOST_BYTES_AT_ONCE if extension in _IMAGES else MOST_CHARACTERS
                if member.size > most:
                    reason = f"{member.name} has {member.size:,} bytes; at most {most:,} are read."
                    _add(sample, extension, Problem("too-large-file", reason))
                    continue
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
                if len(data) != member.size:
                    raise EOFError(f"the file is cut off in {member.name}")
                _add(sample, extension, data)
        if sample:
            yield {**partitions, **sample}


def _size(sample: dict[str, Any]) -> int:
    return sum(len(value) for value in sample.values() if isinstance(value, (bytes, str)))


def _add(sample: dict[str, Any], extension: str, data: bytes | Problem) -> None:
    sample[extension] = data
    if extension in _IMAGES:
        sample.setdefault("image", data)
    elif extension == "json" and not isinstance(data, Problem):
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(fields, dict):
            for key, value in fields.items():
                sample.setdefault(key, value)


def _replace(sample: dict[str, Any], extension: str, problem: Problem) -> None:
    sample[extension] = problem
    if extension in _IMAGES:
        sample["image"] = problem


def _id(sample: dict[str, Any], column: str) -> Any:
    value = value_at(sample, column)
    if isinstance(value, Problem):
        return None
    return value.decode("utf-8", "surrogateescape").strip() if isinstance(value, bytes) else value


def _cell(sample: dict[str, Any], column: str) -> Any:
    """Return a cell; texts are stored as files, so their bytes are decoded."""
    value = value_at(sample, column)
    if value is None:
        return Problem("missing-file", f"The sample has no {column!r}; it has {sorted(sample)}.")
    if isinstance(value, bytes) and column not in _IMAGES and column != "image":
        return value.decode("utf-8", "surrogateescape").strip()
    return value


def _code(sample: dict[str, Any], column: str) -> Any:
    code = _cell(sample, column)
    return None if isinstance(code, Problem) else code
