"""Galleries of images to search: files, folders and Parquet tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.encoder import Encoder
from runtime.errors import ImageError, InputError
from runtime.extras import needing
from runtime.indexes.exact import Hit, Index
from runtime.preprocessing.batching import windows
from runtime.preprocessing.image import ImageSource
from runtime.preprocessing.image_formats import IMAGE_SUFFIXES

__all__ = [
    "ID_COLUMNS",
    "Found",
    "Gallery",
    "gallery_from_images",
    "image_bytes",
    "images_from_paths",
    "open_table",
    "search_images",
]

_BATCH_IMAGES = 32

ID_COLUMNS = ("id", "image_id", "key", "name", "filename", "file_name", "path", "emoji")
"""Possible id columns of a Parquet file of images; the first one present is used."""


def images_from_paths(paths: Iterable[Path]) -> Iterator[tuple[str, Path | bytes]]:
    """Yield names and images of files, folders (recursively, by name) and rows of Parquet tables.

    Raises:
        InputError: a path does not exist, or a folder or table has no images.
    """
    for path in paths:
        if path.is_dir():
            yield from _images_in_folder(path)
        elif not path.exists():
            raise InputError(f"{path} does not exist; pass image files, folders or Parquet files.")
        elif path.suffix.lower() == ".parquet":
            yield from _images_in_table(path)
        else:
            yield str(path), path


def _images_in_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise InputError(f"{folder} has no images; expected files with {', '.join(sorted(IMAGE_SUFFIXES))}.")
    yield from ((str(path), path) for path in found)


def _images_in_table(path: Path) -> Iterator[tuple[str, bytes]]:
    with open_table(path) as table:
        yield from _rows(path, table)


@contextmanager
def open_table(path: Path) -> Iterator[Any]:
    """Open a Parquet file of images with pyarrow.

    Raises:
        InputError: the file cannot be read, or it has no column ``image``.
        MissingPackageError: pyarrow is not installed.
    """
    with needing(f"The Parquet file {path}", "babeltower[index]", remedy="or pass a folder of images."):
        import pyarrow
        import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if "image" not in names:
                raise InputError(f"{path} has columns {names}; expected one named 'image' with image files.")
            yield table
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{path} cannot be read as Parquet ({error}). Restore it if it is truncated or damaged."
        ) from error


def _rows(path: Path, table: Any) -> Iterator[tuple[str, bytes]]:
    id_column = next((name for name in ID_COLUMNS if name in table.schema_arrow.names), None)
    number = 0
    for batch in table.iter_batches(batch_size=64, columns=["image", *([id_column] if id_column else [])]):
        for row in batch.to_pylist():
            name = str(row[id_column]) if id_column else f"{path}:{number}"
            yield name, image_bytes(path, number, row["image"])
            number += 1


def image_bytes(path: Path, number: int, cell: bytes | Mapping[str, Any] | None) -> bytes:
    """Return the image file in a cell of a Parquet file.

    Raises:
        InputError: the cell holds something else.
    """
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(data, bytes):
        raise InputError(
            f"Row {number} of {path} has an image of type {type(data).__name__}; expected the bytes of an "
            "image file, or a struct with a field 'bytes'."
        )
    return data


@dataclass(frozen=True, slots=True)
class _Problem:
    """Error message of an image that cannot be decoded."""

    message: str


@dataclass(frozen=True, slots=True)
class Found:
    """Hits of a search, and the error messages of skipped images."""

    hits: list[Hit]
    skipped: list[str]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Index of embedded images, and the error messages of skipped ones."""

    index: Index
    skipped: list[str]


def search_images(
    encoder: Encoder,
    paths: Iterable[Path],
    query: str,
    *,
    language: str | None,
    k: int,
    dim: int | None = None,
    skip_bad: bool = False,
) -> Found:
    """Embed images and a text, and rank the images; arguments and errors as in ``gallery_from_images``.

    Raises:
        InputError: the text cannot be embedded.
    """
    query_vector = encoder.embed_texts([query], language, dim=dim)
    gallery = gallery_from_images(encoder, paths, dim=dim, skip_bad=skip_bad)
    return Found(gallery.index.search(query_vector, fingerprint=encoder.fingerprint, k=k)[0], gallery.skipped)


def gallery_from_images(
    encoder: Encoder, paths: Iterable[Path], *, dim: int | None = None, skip_bad: bool = False
) -> Gallery:
    """Embed images into a gallery.

    Args:
        paths: See ``images_from_paths``.
        skip_bad: Skip images that cannot be decoded, instead of failing.

    Raises:
        ImageError: an image cannot be decoded, unless ``skip_bad``.
        InputError: there are no images.
    """
    names: list[str] = []
    skipped: list[str] = []
    parts = []
    with ThreadPoolExecutor() as pool:
        for window in windows(images_from_paths(paths), _BATCH_IMAGES):
            decoded = list(pool.map(partial(_decoded, encoder, skip_bad=skip_bad), window))
            skipped += [image.message for image in decoded if isinstance(image, _Problem)]
            good = [
                (window[i][0], image) for i, image in enumerate(decoded) if not isinstance(image, _Problem)
            ]
            names += [name for name, _ in good]
            parts.append(encoder.embed_images([image for _, image in good], dim=dim))
    if not names:
        raise InputError("There are no images to search; pass image files, folders or Parquet files.")
    return Gallery(Index(tuple(names), np.concatenate(parts), encoder.fingerprint), skipped)


def _decoded(encoder: Encoder, item: tuple[str, Path | bytes], *, skip_bad: bool) -> ImageSource | _Problem:
    name, source = item
    try:
        return encoder.checked_image(source, name=name)
    except ImageError as error:
        if not skip_bad:
            raise
        return _Problem(str(error))
