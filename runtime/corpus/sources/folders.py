"""Folder tree of images: each file is a row, and its path relative to the folder is the id."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.corpus.files import File, FileSet
from runtime.corpus.rows import NO_COLUMN, Columns, IdType, ImageFile, Needs, Problem, Rows
from runtime.corpus.sources.base import PIECE_IMAGES, Reading, SourceFormat
from runtime.corpus.sources.opened import SourceFiles
from runtime.errors import InputError
from runtime.manifest import Modality
from runtime.preprocessing.image_formats import RAW_SUFFIXES

__all__ = ["FolderSource"]


class FolderSource:
    """Image files of a folder, sorted by path and read lazily."""

    def __init__(self, name: str, files: FileSet, columns: Columns, reading: Reading) -> None:
        self._files = SourceFiles(name, files, reading, what="images")
        if {columns.id, columns.text, columns.image, columns.language} - {None, NO_COLUMN}:
            raise InputError(f"{name} is a folder of images and has no columns; got {columns}.")
        self.name, self.format, self.columns = name, SourceFormat.IMAGES, Columns()
        self.modality, self.id_type, self.n_files = Modality.IMAGE, IdType.STRING, 1
        self.files, self.patience = files, self._files.patience
        self.bad_files = self._files.bad
        self.notes = self._files.notes

    def identity(self) -> str:
        """Return a hash of file names and sizes."""
        return self._files.identity()

    def n_rows(self, file: int) -> int:
        """Return the number of files in the tree."""
        return len(self.files.files)

    def read(self, file: int, needs: Needs) -> Iterator[Rows]:
        """Yield the files as rows without reading them."""
        files = self.files.files
        for start in range(0, len(files), PIECE_IMAGES):
            piece = files[start : start + PIECE_IMAGES]
            if needs(start, start + len(piece)):
                yield Rows(
                    start,
                    [entry.name for entry in piece],
                    [_item(entry) for entry in piece],
                )


def _item(file: File) -> ImageFile | Problem:
    if file.suffix in RAW_SUFFIXES:
        reason = (
            f"{file.name} is a camera's raw file ({file.suffix}), which is not decoded. Convert it to JPEG."
        )
        return Problem("raw-image", reason)
    return ImageFile(file.filesystem, file.path, is_listed=True)
