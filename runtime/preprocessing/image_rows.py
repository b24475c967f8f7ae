"""Rows of an image file, decoded a few at a time with libvips, if installed: large images in little memory.

Pillow decodes an image as a whole: four bytes for each pixel, and copies while it is resized. libvips decodes
JPEG and PNG row by row, by the same libraries, and Pillow still resizes: along the rows, which needs one row
at a time, then along the columns of what is left. Pixels are Pillow's to the bit, which is checked once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from runtime.errors import ImageError
from runtime.preprocessing.image_formats import open_image

__all__ = ["ImageRows", "rows_of_file", "rows_of_strip"]

_LOADERS = {"JPEG": "jpegload_buffer", "MPO": "jpegload_buffer", "PNG": "pngload_buffer"}
_BANDS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_JPEG_MODES = ("L", "RGB")
_SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
_SAMPLING_FACTORS = ([(1, 1)] * 3, [(2, 1), (1, 1), (1, 1)], [(2, 2), (1, 1), (1, 1)])
"""Sampling factors of the colour JPEGs that are compared with Pillow's; others are left to Pillow."""

_STRIP_PIXELS = 1 << 18
_COEFFICIENT_BYTES = 2
_LARGEST_BLOCK = 16
_DECODER_BYTES = 6 << 20
"""Memory that decoding rows takes besides coefficients: measured 3 to 6 MiB at 6,000 columns."""


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Rows of an image file.

    Attributes:
        mode: Pillow's mode: L, LA, RGB or RGBA.
        n_bytes: Upper bound of the memory that decoding takes.
    """

    data: bytes
    loader: str
    mode: str
    size: tuple[int, int]
    n_bytes: int

    def strips(self, name: str) -> Iterator[tuple[int, Image.Image]]:
        """Yield the number of the first row, and the rows as an image, from top to bottom.

        Args:
            name: Name of the image in error messages.

        Raises:
            ImageError: the file is damaged, or its data end early.
        """
        yield from _strips(_vips(), self, name)


def rows_of_strip(width: int) -> int:
    """Return the number of rows that are decoded and resized at a time."""
    return max(1, _STRIP_PIXELS // width)


def rows_of_file(data: bytes, image: ImageFile.ImageFile) -> ImageRows | None:
    """Return the rows of a file, or ``None`` if Pillow must decode it as a whole.

    Args:
        image: The file as Pillow has opened it, not decoded yet.
    """
    rows = _rows(data, image)
    return None if rows is None or _vips() is None else rows


def _rows(data: bytes, image: ImageFile.ImageFile) -> ImageRows | None:
    if image.mode not in _BANDS or image.format not in _LOADERS:
        return None
    n_bytes = _bytes_of_png(image) if image.format == "PNG" else _bytes_of_jpeg(image)
    if n_bytes is None:
        return None
    loader = _LOADERS[image.format]
    return ImageRows(data, loader, image.mode, image.size, n_bytes + _DECODER_BYTES)


def _bytes_of_png(image: ImageFile.ImageFile) -> int | None:
    """Return the memory of a PNG's rows; ``None`` if libvips gives other pixels, or takes all at once."""
    is_plain = [tile[3] for tile in image.tile] == [image.mode]  # else 16 bits, a palette or fewer levels
    if not is_plain or image.info.get("interlace") or "transparency" in image.info:
        return None
    return 2 * image.width * _BANDS[image.mode]


def _bytes_of_jpeg(image: ImageFile.ImageFile) -> int | None:
    """Return the memory of a JPEG's rows, and of all coefficients of a progressive one."""
    factors = [(layer[1], layer[2]) for layer in getattr(image, "layer", ())]
    if image.mode not in _JPEG_MODES or (len(factors) != 1 and factors not in _SAMPLING_FACTORS):
        return None
    n_bytes = 2 * image.width * _BANDS[image.mode]
    if "progressive" in image.info:
        across, down = (-(-size // _LARGEST_BLOCK) * _LARGEST_BLOCK for size in image.size)
        n_samples = sum(h * v for h, v in factors) / (factors[0][0] * factors[0][1])
        n_bytes += int(_COEFFICIENT_BYTES * across * down * n_samples)
    return n_bytes


def _strips(vips: Any, rows: ImageRows, name: str) -> Iterator[tuple[int, Image.Image]]:
    (width, height), n_bands = rows.size, _BANDS[rows.mode]
    n_rows = rows_of_strip(width)
    try:
        image = getattr(vips.Image, rows.loader)(rows.data, access="sequential", fail_on="truncated")
        if (image.width, image.height, image.bands, image.format) != (width, height, n_bands, "uchar"):
            raise ImageError(f"Image {name} cannot be decoded: its headers contradict each other.")
        region = vips.Region.new(image)
        for top in range(0, height, n_rows):
            size = width, min(n_rows, height - top)
            strip = region.fetch(0, top, *size)
            yield top, Image.frombuffer(rows.mode, size, strip, "raw", rows.mode, 0, 1)
    except vips.Error as error:
        reasons = str(getattr(error, "detail", "") or error).split("\n")
        raise ImageError(f"Image {name} cannot be decoded: {reasons[0].strip()}.") from None


@lru_cache(maxsize=1)
def _vips() -> Any:
    """Return pyvips, if it is installed and decodes test files to the same pixels as Pillow."""
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    try:
        import pyvips
    except (ImportError, OSError):
        return None
    pyvips.cache_set_max(0)
    return pyvips if all(_is_same(pyvips, file) for file in _test_files()) else None


def _test_files() -> Iterator[bytes]:
    random = np.random.default_rng(0)
    for mode, n_bands in _BANDS.items():
        levels = random.integers(0, 256, (37, 43, n_bands), dtype=np.uint8)
        image = Image.frombuffer(mode, (43, 37), levels.tobytes(), "raw", mode, 0, 1)
        forms: list[tuple[str, dict[str, Any]]] = [("PNG", {})]
        if mode in _JPEG_MODES:
            forms += [
                ("JPEG", {"subsampling": subsampling, "progressive": progressive})
                for subsampling in _SUBSAMPLINGS
                for progressive in (False, True)
            ]
        for form, options in forms:
            file = io.BytesIO()
            image.save(file, form, **options)
            yield file.getvalue()


def _is_same(vips: Any, data: bytes) -> bool:
    name = "of libvips' self-check"
    image = open_image(data, name=name)
    rows = _rows(data, image)
    if rows is None:
        return False
    try:
        found = Image.new(image.mode, image.size)
        for top, strip in _strips(vips, rows, name):
            found.paste(strip, (0, top))
    except ImageError:
        return False
    return np.array_equal(np.asarray(found), np.asarray(image))
