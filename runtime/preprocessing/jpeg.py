"""JPEG decoding with simplejpeg, if installed: bit-identical to Pillow and faster.

Both use libjpeg-turbo. Pillow copies every row out of the decoder and widens it from three to four bytes per
pixel; here the decoder writes four bytes per pixel itself, and Pillow uses its buffer without a copy.
"""

from __future__ import annotations

import io
import threading
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import ImageError
from runtime.preprocessing.image_formats import open_image

__all__ = ["image_from_jpeg", "require_whole_jpeg"]

_START = b"\xff\xd8\xff"
_BYTES_A_PIXEL = 4
_BLOCK, _FLAT = 8, 2
_LARGEST_KEPT_BYTES = 64 << 20

_buffers = threading.local()


def image_from_jpeg(data: bytes) -> Image.Image | None:
    """Decode a colour JPEG to an RGB image backed by a thread-local buffer.

    Returns:
        An image that is valid until the next call on the same thread; or ``None`` if Pillow must decode: the
        file is not a colour JPEG, damaged or too large, or simplejpeg or pyarrow is not installed.
    """
    decoder = _decoder()
    if decoder is None or not data.startswith(_START):
        return None
    return _decoded(decoder, data)


def require_whole_jpeg(data: bytes, image: Image.Image, name: str) -> None:
    """Check that the data of a JPEG that Pillow has decoded do not end early.

    The decoder fills what is missing and only warns, which Pillow does not hear. If a missing
    end is possible, simplejpeg, where it is installed, decodes the file again and is asked for warnings: the
    last block of a baseline JPEG is flat then; of a progressive one, it is only smoother.

    Raises:
        ImageError: they do.
    """
    width, height = image.size
    corner = ((width - 1) // _BLOCK * _BLOCK, (height - 1) // _BLOCK * _BLOCK, width, height)
    darkest, brightest = image.crop(corner).convert("L").getextrema()
    decoder = _simplejpeg()
    if decoder is None or (
        float(brightest) - float(darkest) > _FLAT and not image.info.get("progressive")  # type: ignore[arg-type]
    ):
        return
    try:
        decoder.decode_jpeg(data, colorspace="CMYK" if image.mode == "CMYK" else "GRAY")
    except (ValueError, RuntimeError) as error:
        if "premature end" in str(error).lower():
            raise ImageError(f"Image {name} cannot be decoded: its data end early.") from error


def _decoded(decoder: Any, data: bytes) -> Image.Image | None:
    import pyarrow

    try:
        height, width, colours, _ = decoder.decode_jpeg_header(data)
        n_bytes = height * width * _BYTES_A_PIXEL
        if colours != "YCbCr" or not 0 < n_bytes <= _LARGEST_KEPT_BYTES:
            return None
        if height * width > (Image.MAX_IMAGE_PIXELS or n_bytes):
            return None
        buffer = _buffer(n_bytes)
        decoder.decode_jpeg(data, colorspace="RGBX", buffer=buffer)
    except (ValueError, RuntimeError):  # also raised for warnings of the decoder; Pillow decides
        return None
    levels = pyarrow.Array.from_buffers(pyarrow.uint8(), n_bytes, [None, pyarrow.py_buffer(buffer)])
    kind = pyarrow.list_(pyarrow.uint8(), _BYTES_A_PIXEL)
    pixels = pyarrow.FixedSizeListArray.from_buffers(kind, height * width, [None], children=[levels])
    return Image.fromarrow(pixels, "RGB", (width, height))


def _buffer(n_bytes: int) -> bytearray:
    held: bytearray | None = getattr(_buffers, "held", None)
    if held is None or len(held) < n_bytes:
        held = _buffers.held = bytearray(n_bytes)
    return held


def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


@lru_cache(maxsize=1)
def _decoder() -> Any:
    """Return simplejpeg, if it decodes test files to the same pixels as Pillow."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return None
    simplejpeg = _simplejpeg()
    if simplejpeg is None or not hasattr(Image, "fromarrow"):
        return None
    random = np.random.default_rng(0)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (37, 43, 3), dtype=np.uint8)).save(
            file, "JPEG", subsampling=subsampling
        )
        found = _decoded(simplejpeg, file.getvalue())
        expected = open_image(file.getvalue(), name="of simplejpeg's self-check")
        if found is None or not np.array_equal(np.asarray(found), np.asarray(expected)):
            return None
    return simplejpeg
