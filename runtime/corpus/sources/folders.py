"""A folder tree of images: each file is a row, its path below the folder the id."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.corpus.files import FileSet, digest_of_files
from runtime.corpus.rows import Columns, IdType, ImageFile, Needs, Rows
from runtime.corpus.sources.base import PIECE_IMAGES, SourceFormat
from runtime.errors import InputError
from runtime.manifest import Modality

__all__ = ["FolderSource"]


class FolderSource:
    """Image files by path; they are read when they are needed."""

    def __init__(self, name: str, files: FileSet, columns: Columns) -> None:
        if not files.files:
            raise InputError(f"{name} holds no images.")
        if columns != Columns():
            raise InputError(f"{name} is a folder of images, which has no columns; got {columns}.")
        self.name, self.format, self.columns = name, SourceFormat.IMAGES, columns
        self.modality, self.id_type, self.n_files = Modality.IMAGE, IdType.STRING, 1
        self._files = files

    def identity(self) -> str:
        """Of names and sizes."""
        return digest_of_files(self._files.files, map(self._files.relative, self._files.files))

    def n_rows(self, file: int) -> int:
        """Files in the tree."""
        return len(self._files.files)

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """The files as rows, unread."""
        files = self._files.files
        for start in range(0, len(files), PIECE_IMAGES):
            piece = files[start : start + PIECE_IMAGES]
            if needs(start, start + len(piece)):
                yield Rows(
                    start,
                    [self._files.relative(entry) for entry in piece],
                    [ImageFile(self._files.filesystem, entry.path) for entry in piece],
                )
