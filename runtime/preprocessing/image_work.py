"""Work that the images of one request may ask for, known from their headers before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from runtime.errors import ImageError, InputError
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing.image import work_of_file

__all__ = ["name_of_row", "works_of_files"]

_WORK_OF_SEVERAL = 1 << 26
"""Pixels of work that a request of several images may always take: a second or two. A sender may split it."""

_WORK_PER_BYTE = 16
"""Further pixels of work for each byte of a request's files; photographs take less than half of it."""


def works_of_files(
    files: Sequence[bytes],
    preprocessing: ImagePreprocessing,
    *,
    max_bytes: int,
    max_pixels: int | None,
    places: Sequence[int] | None = None,
) -> list[int]:
    """Return the work of each image of a request, in pixels to decode and resize.

    Args:
        max_bytes: Maximum size of a file.
        max_pixels: Maximum width × height of an image; default: Pillow's limit.
        places: Position of each image in the request, for errors; default: its position here.

    Raises:
        ImageError: an image is too large, or of a format that is not supported, or its header is damaged.
        InputError: all images together take too much work for their size in bytes.
    """
    numbered = list(zip(range(len(files)) if places is None else places, files, strict=True))
    for i, file in numbered:
        if len(file) > max_bytes:
            raise ImageError(
                f"Image {name_of_row(i, file)} exceeds the limit of {max_bytes} bytes. Make it smaller first."
            )
    works = [
        work_of_file(file, preprocessing, name=name_of_row(i, file), max_pixels=max_pixels)
        for i, file in numbered
    ]
    # A single image may have all its pixels, and as many scans as encoders write.
    most = max_pixels or Image.MAX_IMAGE_PIXELS or 0
    limit = max(2 * most, _WORK_OF_SEVERAL) if len(files) == 1 else _WORK_OF_SEVERAL
    limit += _WORK_PER_BYTE * sum(map(len, files))
    if sum(works) > limit:
        raise InputError(
            f"The {len(files)} images of the request take {sum(works)} pixels to decode and resize; the "
            f"limit for their size in bytes is {limit}. Send fewer images in a request."
        )
    return works


def name_of_row(number: int, file: bytes) -> str:
    """Name of an image in errors: its position in the request, and its size."""
    return f"{number} of the request, {len(file)} bytes,"
