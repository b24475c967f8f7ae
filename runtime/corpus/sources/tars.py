"""WebDataset tars: files with the same name up to the first dot form one sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any

from runtime.corpus.files import FileSet, digest_of_files
from runtime.corpus.rows import Columns, IdType, Needs, Problem, Rows
from runtime.corpus.sources.base import PIECE_IMAGES, SourceFormat, chosen_columns
from runtime.corpus.sources.records import Cells, modality_of
from runtime.errors import InputError
from runtime.preprocessing.batching import windows
from runtime.preprocessing.image_formats import IMAGE_SUFFIXES

__all__ = ["TarSource"]

_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


class TarSource:
    """Samples in tar order, with columns ``__key__``, the files' extensions, ``image`` for the first image
    of any extension, and the fields of a ``json`` file.

    Raises:
        InputError: a tar cannot be read, or columns are missing or ambiguous.
    """

    def __init__(self, name: str, files: FileSet, columns: Columns) -> None:
        if not files.files:
            raise InputError(f"{name} holds no tar files.")
        self.name, self.format, self.id_type = name, SourceFormat.WEBDATASET, IdType.STRING
        self._files = files
        self.n_files = len(files.files)
        first = next(self._samples(0), None)
        if first is None:
            raise InputError(f"{files.files[0].path} holds no samples.")
        if columns == Columns() and "image" in first:
            columns = Columns(image="image")  # embed the image of a captioned image
        if columns.id is None:
            columns = Columns("__key__", columns.text, columns.image, columns.language)
        self.columns = chosen_columns(columns, list(first), where=files.files[0].path)
        self.modality = modality_of(self.columns)

    def identity(self) -> str:
        """Return a hash of file names and sizes."""
        return digest_of_files(self._files.files, map(self._files.relative, self._files.files))

    def n_rows(self, file: int) -> None:
        """Return ``None``: the number is unknown until the tar is read."""

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield all samples of a tar as rows."""
        columns = self.columns
        item = columns.text if columns.text is not None else columns.image
        cells = Cells(columns, self.id_type, self._files.filesystem, self._files.root)
        start = 0
        for samples in windows(self._samples(file), PIECE_IMAGES):
            yield cells.rows(
                start,
                [sample.get(columns.id or "") for sample in samples],
                [_cell(sample, item or "") for sample in samples],
                None if columns.language is None else [_code(s, columns.language) for s in samples],
            )
            start += len(samples)

    def _samples(self, file: int) -> Iterator[dict[str, Any]]:
        path = self._files.files[file].path
        sample: dict[str, Any] = {}
        try:
            with (
                self._files.filesystem.open_input_stream(path, buffer_size=1 << 20) as opened,
                tarfile.open(fileobj=opened, mode="r|*") as tar,
            ):
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, dot, extension = name.partition(".")
                    if not member.isfile() or not dot or not stem or folder.startswith("__"):
                        continue
                    key = f"{folder}/{stem}" if folder else stem
                    if sample and sample["__key__"] != key:
                        yield sample
                        sample = {}
                    sample["__key__"] = key
                    content = tar.extractfile(member)
                    _add(sample, extension.lower(), content.read() if content is not None else b"")
                _require_end(tar)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(
                f"{path} cannot be read as a tar ({error}). Restore it if it is truncated or damaged."
            ) from error
        if sample:
            yield sample


def _require_end(tar: Any) -> None:
    """Check that an empty block follows the last member; ``tarfile`` also stops where a file is cut."""
    if tar.fileobj.tell() - tar.offset < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the file ends without the empty blocks that close a tar")


def _add(sample: dict[str, Any], extension: str, data: bytes) -> None:
    sample[extension] = data
    if extension in _IMAGES:
        sample.setdefault("image", data)
    elif extension == "json":
        try:
            fields = json.loads(data)
        except ValueError:
            return
        if isinstance(fields, dict):
            for key, value in fields.items():
                sample.setdefault(key, value)


def _cell(sample: dict[str, Any], column: str) -> Any:
    """Return a cell; texts are stored as files, so their bytes are decoded."""
    value = sample.get(column)
    if value is None:
        return Problem("missing-file", f"The sample has no {column!r}; it has {sorted(sample)}.")
    if isinstance(value, bytes) and column not in _IMAGES and column != "image":
        return value.decode("utf-8", "surrogateescape").strip()
    return value


def _code(sample: dict[str, Any], column: str) -> Any:
    code = _cell(sample, column)
    return None if isinstance(code, Problem) else code
