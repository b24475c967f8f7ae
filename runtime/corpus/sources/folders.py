"""Folder tree of images: each file is a row, and its path relative to the folder is the id."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.corpus.files import FileSet, digest_of_files
from runtime.corpus.rows import Columns, IdType, ImageFile, Needs, Rows
from runtime.corpus.sources.base import PIECE_IMAGES, SourceFormat
from runtime.errors import InputError
from runtime.manifest import Modality

__all__ = ["FolderSource"]


class FolderSource:
    """Image files of a folder, sorted by path and read lazily."""

    def __init__(self, name: str, files: FileSet, columns: Columns) -> None:
        if not files.files:
            raise InputError(f"{name} holds no images.")
        if columns != Columns():
            raise InputError(f"{name} is a folder of images and has no columns; got {columns}.")
        self.name, self.format, self.columns = name, SourceFormat.IMAGES, columns
        self.modality, self.id_type, self.n_files = Modality.IMAGE, IdType.STRING, 1
        self._files = files

    def identity(self) -> str:
        """Return a hash of file names and sizes."""
        return digest_of_files(self._files.files, map(self._files.relative, self._files.files))

    def n_rows(self, file: int) -> int:
        """Return the number of files in the tree."""
        return len(self._files.files)

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield the files as rows without reading them."""
        files = self._files.files
        for start in range(0, len(files), PIECE_IMAGES):
            piece = files[start : start + PIECE_IMAGES]
            if needs(start, start + len(piece)):
                yield Rows(
                    start,
                    [self._files.relative(entry) for entry in piece],
                    [ImageFile(self._files.filesystem, entry.path) for entry in piece],
                )
