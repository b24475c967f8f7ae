"""Image preprocessing to uint8 pixels, identical to the reference preprocessing.

Every pixel comes from Pillow's own resize, in the order and rounding of the reference. There is no draft
decoding, reduced first pass or EXIF rotation, since the references do none of these. Optimizations skip
unneeded work and never change pixels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import ImageError, InputError
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing.image_bounds import require_bounded, scans_of_jpeg
from runtime.preprocessing.image_formats import (
    open_image,
    require_openable,
    require_whole_decoding,
)
from runtime.preprocessing.image_rows import ImageRows, rows_of_file, rows_of_strip
from runtime.preprocessing.jpeg import image_from_jpeg, require_whole_jpeg

__all__ = [
    "DecodingCost",
    "ImageSource",
    "Snapshot",
    "cost_of_file",
    "decode",
    "pixels_from_file",
    "pixels_from_image",
    "pixels_from_source",
    "require_several",
    "require_size",
    "size_of_file",
    "snapshot_from_source",
]

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]"
)
"""Path, encoded file bytes, Pillow image, or uint8 (height, width, 3) RGB array."""

_callers_images = threading.RLock()
"""Lock held while a caller's Pillow image is decoded or copied. It is global: images may share a file without
showing it (members of a tar, frames of one GIF), and Pillow locks neither images nor files."""

_LARGEST_RESIZED_PIXELS = 1 << 24
"""Width × height (64 MiB): a long thin image grows when its shortest side is fitted, and Pillow's ``box``
option, which would resize only the cropped part, gives other pixels. Fitted to 224 pixels, an image may be
334 times as long as wide."""

_LARGEST_WHOLE_BYTES = 16 << 20
"""Memory up to which Pillow decodes and resizes an image as a whole, though it could be done by rows."""

_JPEG_FORMATS = ("JPEG", "MPO")

_ENCODERS_SCANS = 10
"""Scans of a usual progressive JPEG, which take about the time of decoding its pixels once more."""

_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}
"""Bytes per pixel of an image; other modes have 4."""

_DECODERS_BYTES = {"WEBP": 12, "AVIF": 8, "TIFF": 8}
"""Bytes per pixel that a format's decoder takes besides the image itself, measured."""

_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")

_THUMBNAILS_SCANS = 2
"""Scans of a photograph and the thumbnail in it, which are found together."""

_BY_STRIPS = ("L", "LA", "RGB", "RGBA")
"""Modes of which rows may be resized alone; Pillow has other filters, or more levels, for others."""

_PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}
"""Modes that Pillow multiplies by their transparency before it resizes them, and divides by it afterwards."""

_TALLEST = 1.5
"""Height ÷ width up to which Pillow resizes rows first; for taller images it resizes columns first."""

_SHRUNK = 3
"""How often the size of an image to be squashed is at least in the file, for ``_TALLEST`` to hold."""

_SUPPORT = {Image.Resampling.BICUBIC: 2.0, Image.Resampling.BILINEAR: 1.0, Image.Resampling.LANCZOS: 3.0}
"""Filter radius in pixels, when not downscaling."""

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Snapshot of an image: a path, bytes or pixels that the caller can no longer change.

    Attributes:
        name: Name of the image in error messages.
    """

    content: str | bytes | Image.Image | NDArray[np.uint8]
    name: str


@dataclass(frozen=True, slots=True)
class DecodingCost:
    """Cost of decoding and resizing a file.

    Attributes:
        n_pixels: Pixels to decode, once a pass, and to resize.
        n_bytes: Upper bound of the memory of ``pixels_from_file``, of the decoder and of copies too.
        rows: Rows of the file, where they can be decoded and resized a few at a time.
    """

    n_pixels: int
    n_bytes: int
    rows: ImageRows | None = None


def snapshot_from_source(
    source: ImageSource | Snapshot, *, name: str | None = None, max_pixels: int | None = None
) -> Snapshot:
    """Copy a caller's image, so that other threads may work on it.

    A Pillow image is decoded if necessary and copied, on the calling thread and one at a time in the process,
    since two images may share a file. Its current frame is used. Buffers and arrays are copied; a file is
    read later, when it is decoded.

    Args:
        source: See ``ImageSource``; a snapshot is returned as is.
        name: Name of the image in error messages; default: its path.
        max_pixels: See ``decode``.

    Raises:
        ImageError: the type is unknown, or ``decode`` rejects the Pillow image or array.
    """
    if isinstance(source, Snapshot):
        return source
    name = name or _name_of(source)
    try:
        return Snapshot(_own_content(source, name, max_pixels), name)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"Image {name} cannot be decoded: {_reason(error)}.") from error


def decode(
    source: ImageSource | Snapshot, *, name: str | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Decode an image fully; files are closed afterwards, a caller's Pillow image is left open.

    Args:
        source: See ``ImageSource``. Of an animated file the first frame is used, of a Pillow image the
            current one.
        name: Name of the image in error messages; default: its path.
        max_pixels: Width × height above which an image is rejected; default: ``PIL.Image.MAX_IMAGE_PIXELS``.
            Pillow itself rejects more than twice its own limit.

    Returns:
        The image in the mode of its file, unrotated; never the caller's own object.

    Raises:
        ImageError: the image is missing, empty, truncated, not an image, of a format that is not in
            ``runtime.preprocessing.image_formats.FORMATS``, has no pixels, or more than ``max_pixels``.
    """
    snapshot = snapshot_from_source(source, name=name, max_pixels=max_pixels)
    name = snapshot.name
    try:
        return _loaded(snapshot, max_pixels)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"Image {name} does not exist.") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise ImageError(f"Image {name} cannot be decoded: {_reason(error)}.") from error


def pixels_from_source(
    source: ImageSource | Snapshot,
    preprocessing: ImagePreprocessing,
    *,
    name: str | None = None,
    max_pixels: int | None = None,
) -> NDArray[np.uint8]:
    """Decode and preprocess an image; arguments and errors as in ``decode`` and ``pixels_from_image``.

    Returns:
        uint8 (3, height, width), C-contiguous.
    """
    image = _from_fast_jpeg(source, name or _name_of(source)) if isinstance(source, bytes) else None
    if image is None or (max_pixels is not None and image.width * image.height > max_pixels):
        image = decode(source, name=name, max_pixels=max_pixels)
    return pixels_from_image(image, preprocessing)


def cost_of_file(
    data: bytes, preprocessing: ImagePreprocessing, *, name: str, max_pixels: int | None = None
) -> DecodingCost:
    """Return what decoding and resizing an image file takes; only its header is read.

    Raises:
        ImageError: the header is damaged, or ``decode`` or ``pixels_from_image`` rejects such a format or
            size.
    """
    if not data:
        raise ImageError(f"Image {name} cannot be decoded: it is empty (0 bytes).")
    image = open_image(data, name=name)
    require_size(image.size, name, max_pixels)
    width, height = _resized_size(image.size, preprocessing)
    n_scans = scans_of_jpeg(data)
    n_passes = max(1, n_scans // _ENCODERS_SCANS)
    n_pixels, n_resized = image.width * image.height, width * height
    n_work = n_pixels * n_passes + n_resized
    stored = _STORED_BYTES.get(image.mode, 4)
    decoding = stored + _DECODERS_BYTES.get(image.format or "", 0)
    if n_scans > _THUMBNAILS_SCANS or "progressive" in image.info:
        decoding += 6  # the coefficients of all scans
    if not _is_resized_by_strips(image.mode, image.size, preprocessing):
        copying = stored + _bytes_of_copies(image, preprocessing)
        return DecodingCost(n_work, n_pixels * max(decoding, copying) + n_resized * 4)
    strip_rows = min(image.height, rows_of_strip(image.width))
    n_kept = image.height * preprocessing.width + strip_rows * (2 * image.width + width)
    n_bytes = n_pixels * decoding + n_kept * 4
    if n_bytes > _LARGEST_WHOLE_BYTES:
        rows = rows_of_file(data, image)
        if rows is not None:
            return DecodingCost(n_work, rows.n_bytes + n_kept * 4, rows)
    return DecodingCost(n_work, n_bytes)


def _bytes_of_copies(image: Image.Image, preprocessing: ImagePreprocessing) -> int:
    """Return the bytes a pixel that copies take where an image is converted and resized as a whole."""
    has_alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
    if preprocessing.order == "convert-resize":
        return 12 if has_alpha else 4
    return 4 if has_alpha else 0


def pixels_from_file(
    data: bytes, preprocessing: ImagePreprocessing, cost: DecodingCost, *, name: str, max_pixels: int
) -> NDArray[np.uint8]:
    """Decode and preprocess an image file in the memory that its cost says; errors as in ``decode``.

    Args:
        cost: Returned by ``cost_of_file`` for this file.

    Returns:
        uint8 (3, height, width), C-contiguous.
    """
    if cost.rows is not None:
        return _pixels_from_strips(cost.rows.strips(name), cost.rows.mode, cost.rows.size, preprocessing)
    return pixels_from_image(decode(data, name=name, max_pixels=max_pixels), preprocessing)


def size_of_file(data: bytes, *, name: str) -> tuple[int, int]:
    """Return the width and height of an image file, unrotated; only its header is read.

    Raises:
        ImageError: the header is damaged, or of a format that ``decode`` rejects.
    """
    if not data:
        raise ImageError(f"Image {name} cannot be decoded: it is empty (0 bytes).")
    with open_image(data, name=name) as image:
        width, height = image.size
    return width, height


def _from_fast_jpeg(data: bytes, name: str) -> Image.Image | None:
    require_whole_decoding(name)
    require_bounded(data, name)
    return image_from_jpeg(data)


def require_several(images: Iterable[ImageSource]) -> Iterable[ImageSource]:
    """Check that several images were passed, not a single one.

    Raises:
        InputError: the argument is a path, bytes, a PIL image or one (height, width, 3) array; or a table,
            whose names would be embedded; or no iterable.
    """
    single = isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image))
    if single or (isinstance(images, np.ndarray) and images.ndim < 4):
        raise InputError("images is a single image; pass a list of images, e.g. embed_images([image]).")
    if isinstance(images, Mapping) or hasattr(images, "columns"):
        raise InputError(
            f"images is a table of type {type(images).__name__}; pass one of its columns, e.g. "
            "embed_images(table['image']), or the table to runtime.corpus.embedded_batches."
        )
    if not isinstance(images, Iterable):
        raise InputError(f"images is of type {type(images).__name__}; expected an iterable of images.")
    return images


def _name_of(source: ImageSource | Snapshot) -> str:
    if isinstance(source, Snapshot):
        return source.name
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"of {_n_bytes(source)} bytes"
    return f"of type {type(source).__name__}"


def _n_bytes(data: bytes | bytearray | memoryview) -> int:
    return data.nbytes if isinstance(data, memoryview) else len(data)


def _own_content(
    source: ImageSource, name: str, max_pixels: int | None
) -> str | bytes | Image.Image | NDArray[np.uint8]:
    if isinstance(source, Image.Image):
        return _copied_image(source, name, max_pixels)
    if isinstance(source, np.ndarray):
        return _copied_array(source, name, max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    remedy = " Pass the result of its read()." if hasattr(source, "read") else ""
    subject = "An image" if name == _name_of(source) else f"Image {name}"
    raise ImageError(
        f"{subject} is of type {type(source).__name__}; expected a path, the bytes of an image file, "
        f"a PIL image or a uint8 array (height, width, 3).{remedy}"
    )


def _copied_image(image: Image.Image, name: str, max_pixels: int | None) -> Image.Image:
    with _callers_images:
        require_openable(image, name)
        require_size(image.size, name, max_pixels)
        try:
            image.load()
            require_size(image.size, name, max_pixels)
            return image.copy()
        except (AssertionError, AttributeError, ValueError) as error:
            file = getattr(image, "fp", None)
            if file is not None and not getattr(file, "closed", False):
                raise
            raise ImageError(
                f"Image {name} cannot be decoded: it is already closed ({_reason(error)}). Keep it and its "
                "file open until it is embedded, or call image.load() before closing its file."
            ) from error


def _copied_array(array: NDArray[np.uint8], name: str, max_pixels: int | None) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ImageError(
            f"Image {name} is an array of {array.dtype} {array.shape}; expected non-empty uint8 "
            "(height, width, 3), RGB."
        )
    require_size((array.shape[1], array.shape[0]), name, max_pixels)
    return np.array(array, order="C")


def _loaded(snapshot: Snapshot, max_pixels: int | None) -> Image.Image:
    content = snapshot.content
    if isinstance(content, (Image.Image, np.ndarray)):
        image = content if isinstance(content, Image.Image) else Image.fromarray(content)
        require_size(image.size, snapshot.name, max_pixels)
        image.load()
        return image
    data = _file_bytes(Path(content)) if isinstance(content, str) else content
    if not data:
        raise ValueError("it is empty (0 bytes)")
    image = open_image(data, name=snapshot.name)
    require_size(image.size, snapshot.name, max_pixels)
    image.load()
    if image.format in _JPEG_FORMATS:
        require_whole_jpeg(data, image, snapshot.name)
    return image


def _file_bytes(path: Path) -> bytes:
    """Read a regular file; a pipe or device could block or never end."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    return path.read_bytes()


def require_size(size: tuple[int, int], name: str, max_pixels: int | None) -> None:
    """Check an image's width and height; see ``decode``.

    Raises:
        ImageError: the image has no pixels, or too many.
    """
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    width, height = size
    n_pixels = width * height
    if not n_pixels:
        raise ImageError(f"Image {name} is {width}×{height}: it has no pixels.")
    if limit is not None and n_pixels > limit:
        raise ImageError(
            f"Image {name} has {width}×{height} = {n_pixels} pixels; the limit is {limit}, "
            "to prevent decompression bombs. Pass a larger max_pixels if you trust the file."
        )


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def pixels_from_image(image: Image.Image, preprocessing: ImagePreprocessing) -> NDArray[np.uint8]:
    """Resize an image, crop it and convert it to RGB.

    Args:
        image: Image in any mode; see ``decode``.

    Returns:
        uint8 (3, height, width), C-contiguous.

    Raises:
        ImageError: Pillow cannot resize or convert the image's mode.

    Source:
        ``resize-convert``: ``open_clip.transform.image_transform_v2``. ``convert-resize``:
        ``transformers.CLIPImageProcessorPil``, which puts transparency on white.
    """
    try:
        if _is_resized_by_strips(image.mode, image.size, preprocessing):
            return _pixels_from_strips(_strips_of_image(image), image.mode, image.size, preprocessing)
        if preprocessing.order == "convert-resize":
            image = _rgb_on_white(image)
        return _pixels(_resized(image, preprocessing))
    except (ValueError, OSError, MemoryError) as error:
        raise ImageError(
            f"An image of mode {image.mode} and size {image.width}×{image.height} cannot be resized: "
            f"{_reason(error)}. Convert it to RGB, or make it smaller first."
        ) from error


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def _is_resized_by_strips(mode: str, size: tuple[int, int], preprocessing: ImagePreprocessing) -> bool:
    """Whether Pillow converts pixels one by one, and resizes rows first: then, each row may go alone."""
    is_known = preprocessing.order == "convert-resize" or mode in _BY_STRIPS
    if not is_known or _RESAMPLING[preprocessing.interpolation] not in _SUPPORT:
        return False
    target = (preprocessing.width, preprocessing.height)
    shrunk = all(side >= _SHRUNK * wanted for side, wanted in zip(size, target, strict=True))
    # The less an image shrinks when it is squashed, the sooner columns are first.
    return (shrunk or preprocessing.resize != "squash") and size[1] <= _TALLEST * size[0]


def _strips_of_image(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    n_rows = rows_of_strip(image.width)
    for top in range(0, image.height, n_rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + n_rows)))


def _pixels_from_strips(
    strips: Iterable[tuple[int, Image.Image]],
    mode: str,
    size: tuple[int, int],
    preprocessing: ImagePreprocessing,
) -> NDArray[np.uint8]:
    """Resize and crop an image of which a few rows are there at a time.

    Pillow resizes along the rows, rounds, then resizes along the columns. So rows are resized as they come,
    unless they are not needed, and cropped between the two passes. Each pass is Pillow's own, at full size.
    """
    resampling = _RESAMPLING[preprocessing.interpolation]
    target = (preprocessing.width, preprocessing.height)
    on_white = preprocessing.order == "convert-resize"
    width, height = _resized_size(size, preprocessing)
    kept = "RGB" if on_white else mode
    if (width, height) != size:  # else, Pillow returns a copy
        kept = _PREMULTIPLIED.get(kept, kept)
    left, top = (
        _offset(resized - wanted, preprocessing.crop_rounding)
        for resized, wanted in zip((width, height), target, strict=True)
    )
    first, last = _rows_needed(size[1], height, top, top + target[1], resampling)
    between = Image.new(kept, (target[0], size[1]))
    for at, strip in strips:
        if at + strip.height > first and at < last:
            rows = _rgb_on_white(strip) if on_white else strip if strip.mode == kept else strip.convert(kept)
            rows = rows.resize((width, rows.height), resampling)
            between.paste(rows.crop((left, 0, left + target[0], rows.height)), (0, at))
    resized = between.resize((target[0], height), resampling)
    cropped = resized.crop((0, top, target[0], top + target[1]))
    return _pixels(cropped.convert(mode) if kept in _PREMULTIPLIED.values() else cropped)


def _rgb_on_white(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert(
            "RGB"
        )
    return image.convert("RGB")


def _resized(image: Image.Image, preprocessing: ImagePreprocessing) -> Image.Image:
    resampling = _RESAMPLING[preprocessing.interpolation]
    target = (preprocessing.width, preprocessing.height)
    if preprocessing.resize == "squash":
        return image.resize(target, resampling)
    width, height = _resized_size(image.size, preprocessing)
    left = _offset(width - target[0], preprocessing.crop_rounding)
    top = _offset(height - target[1], preprocessing.crop_rounding)
    resized = image.resize((width, height), resampling)
    return resized.crop((left, top, left + target[0], top + target[1]))


def _resized_size(size: tuple[int, int], preprocessing: ImagePreprocessing) -> tuple[int, int]:
    """Return the size before the crop.

    Raises:
        ImageError: the image is so long and thin that it would grow beyond the limit.
    """
    target = (preprocessing.width, preprocessing.height)
    if preprocessing.resize == "squash":
        return target
    width, height = _shortest_to(size, target)
    if width * height > _LARGEST_RESIZED_PIXELS:
        raise ImageError(
            f"An image of {size[0]}×{size[1]} becomes {width}×{height} when its shortest side is resized to "
            f"{min(target)}, over the limit of {_LARGEST_RESIZED_PIXELS} pixels. Crop it first."
        )
    return width, height


def _rows_needed(
    n_rows: int, resized: int, top: int, bottom: int, resampling: Image.Resampling
) -> tuple[int, int]:
    """Return the range of rows that the filter reads for resized rows ``top`` to ``bottom``, plus one."""
    scale = n_rows / resized
    reach = _SUPPORT[resampling] * max(scale, 1.0) + 2
    return max(0, int(top * scale - reach)), min(n_rows, int(bottom * scale + reach) + 1)


def _shortest_to(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the size with the shortest side fitted, rounded as torchvision (square) or timm (otherwise)."""
    width, height = size
    if target[0] == target[1]:
        if width <= height:
            return target[0], int(target[0] * height / width)
        return int(target[0] * width / height), target[0]
    ratio = min(height / target[1], width / target[0])
    return round(width / ratio), round(height / ratio)


def _offset(excess: int, rounding: str) -> int:
    return int(excess / 2) if rounding == "floor" else round(excess / 2)
