"""Supported image formats, and the only place where Pillow opens a file.

Pillow supports over forty formats. Some start another program (EPS: Ghostscript), some decode an image of
another size than stated (ICO, ICNS), and many are of use only to attackers. So Pillow may decode only the
formats in ``FORMATS``, and files whose decoding cost is not bounded by their length are rejected first.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from runtime.errors import ImageError
from runtime.preprocessing.image_bounds import require_bounded

with contextlib.suppress(ImportError):  # Pillow below 11.3 has no AVIF
    from PIL import AvifImagePlugin  # noqa: F401

__all__ = [
    "FORMATS",
    "IMAGE_SUFFIXES",
    "OTHER_IMAGE_SUFFIXES",
    "RAW_SUFFIXES",
    "ImageFormat",
    "format_of_bytes",
    "open_image",
    "require_openable",
    "require_whole_decoding",
]


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """Supported format: its use, and the suffixes of its files."""

    use: str
    suffixes: tuple[str, ...]


FORMATS: Mapping[str, ImageFormat] = MappingProxyType(
    {
        "JPEG": ImageFormat(
            "most photographs; decoded by libjpeg-turbo",
            (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp"),
        ),
        "MPO": ImageFormat(
            "photographs of phones and stereo cameras: concatenated JPEGs, of which the first is used",
            (".mpo",),
        ),
        "PNG": ImageFormat(
            "drawings and screenshots, including APNG; also sent by remote encoders for pixels",
            (".png", ".apng"),
        ),
        "GIF": ImageFormat("web animations, of which the first frame is used", (".gif",)),
        "WEBP": ImageFormat("web images and web data sets", (".webp",)),
        "BMP": ImageFormat("uncompressed files of cameras and Windows", (".bmp",)),
        "TIFF": ImageFormat(
            "scans, 16-bit and float images; sent by remote encoders for modes that PNG lacks",
            (".tif", ".tiff"),
        ),
        "AVIF": ImageFormat("images of current browsers and phones", (".avif", ".avifs")),
        "PPM": ImageFormat(
            "uncompressed files of research data sets, such as GTSRB",
            (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
        ),
    }
)
"""Supported formats by Pillow's name, each with its use and suffixes.

Deliberately left out: EPS (runs Ghostscript); ICO, CUR and ICNS (may decode an image of another size than
stated); JPEG 2000 (rare, and its decoding cost is unbounded); PSD, FITS, DDS, TGA and other specialized
formats. See ``docs/decisions/0022-image-formats.md``.
"""

IMAGE_SUFFIXES = frozenset(suffix for form in FORMATS.values() for suffix in form.suffixes)
"""Suffixes of image files in folders; a file named directly may have any suffix."""

OTHER_IMAGE_SUFFIXES = frozenset(
    {
        *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jxr", ".wdp", ".dib"),
        *(".ico", ".cur", ".icns", ".psd", ".xcf", ".tga", ".dds", ".pcx", ".sgi", ".qoi", ".exr", ".hdr"),
        *(".svg", ".svgz", ".eps", ".wmf", ".emf", ".xbm", ".xpm"),
    }
)
"""Suffixes of pictures in other formats: in a folder of images they are rows, bad ones unless misnamed."""

RAW_SUFFIXES = frozenset(
    {".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"}
)
"""Suffixes of raw files of cameras: many are TIFF files that begin with a thumbnail, so none is decoded."""

_PLUGINS = (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
"""Plugins imported above; Pillow would import them when a file is opened, possibly on two threads."""

_OPENED = tuple(name for name in FORMATS if name in Image.OPEN)
"""Formats passed to Pillow; MPO is left out, since Pillow opens it as JPEG."""

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WEBP"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (4, b"ftypavi", "AVIF"),
    (0, b"%!PS", "EPS or PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypmsf1", "HEIC"),
    (4, b"ftypcrx ", "Canon CR3"),
    (4, b"ftyp", "MP4 video"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"icns", "ICNS"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"BLP", "BLP"),
    (0, b"\x01\xda", "SGI"),
    (0, b"\x59\xa6\x6a\x95", "Sun raster"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF"),
    (40, b" EMF", "EMF"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"GRIB", "GRIB"),
    (0, b"BUFR", "BUFR"),
    (0, b"\xb1\x68\xde\x3a", "DCX"),
    (0, b"DanM", "MSP"),
    (0, b"LinS", "MSP"),
    (0, b"/* XPM */", "XPM"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"v/1\1", "OpenEXR"),
    (0, b"gimp xcf", "XCF"),
    (0, b"\0\0\1\xb3", "MPEG video"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (0, b"\xd0\xcf\x11\xe0", "OLE (FlashPix, MIC)"),
    (0, b"PAR1", "Parquet"),
    (0, b"PK\3\4", "ZIP"),
    (0, b"\x1f\x8b", "gzip"),
)
"""Offset, signature and format name; the first match is used."""

_MARKUP = ((b"<svg", "SVG"), (b"<!doctype html", "HTML page"), (b"<html", "HTML page"), (b"<?xml", "XML"))
_BROWSED = 1_024
"""Number of first bytes searched for markup and for a PDF header."""


def open_image(data: bytes, *, name: str) -> ImageFile.ImageFile:
    """Read an image's header; the pixels are decoded lazily.

    Args:
        name: Name of the image in error messages.

    Raises:
        ImageError: the format is not in ``FORMATS``, the file is damaged, it has over twice Pillow's limit of
            pixels, or its decoding cost is not bounded by its length.
    """
    require_whole_decoding(name)
    require_bounded(data, name)
    try:
        return Image.open(io.BytesIO(data), formats=_OPENED)
    except UnidentifiedImageError:
        raise ImageError(f"Image {name} cannot be decoded: {_unidentified(data)}.") from None
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"Image {name} is rejected to prevent decompression bombs: {str(error).rstrip('.')}. Raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust the file."
        ) from error
    except (
        Exception
    ) as error:  # plugins raise OSError, ValueError, zlib.error, warnings turned to errors, ...
        raise ImageError(
            f"Image {name} cannot be decoded: {str(error).rstrip('.') or type(error).__name__}."
        ) from error


def require_openable(image: Image.Image, name: str) -> None:
    """Check that an undecoded Pillow image of a caller has a format in ``FORMATS``.

    Raises:
        ImageError: the format is not supported.
    """
    if not isinstance(image, ImageFile.ImageFile) or not _is_undecoded(image):
        return
    if image.format not in FORMATS:
        raise ImageError(
            f"Image {name} has format {image.format or type(image).__name__} and is not decoded yet; "
            f"{_accepted()}. Decode it first if you trust it: image.load()."
        )
    require_whole_decoding(name)


def require_whole_decoding(name: str) -> None:
    """Check that Pillow is not set to decode truncated files.

    Raises:
        ImageError: ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is set.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            f"Image {name} is not decoded: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so truncated files "
            "would be filled with grey and give wrong vectors. Set it to False, or decode the image yourself "
            "(image.load()) and pass it."
        )


def format_of_bytes(data: bytes) -> str | None:
    """Return the name of a file's format by its first bytes; ``None`` if unknown."""
    for offset, signature, name in _SIGNATURES:
        if data.startswith(signature, offset):
            return name
    start = data[:_BROWSED].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for tag, name in _MARKUP:
        if start.startswith(tag):
            return "SVG" if b"<svg" in start else name
    if data.endswith(b"TRUEVISION-XFILE.\0"):
        return "TGA"
    return "PDF" if b"%pdf-" in start else None


def _unidentified(data: bytes) -> str:
    found = format_of_bytes(data)
    if not data:
        return "the file is empty"
    if found is None:
        return f"its format is unknown; {_accepted()}"
    if found in FORMATS:
        return (
            f"it starts as {found}, but its header is damaged, or this Pillow was built without {found}"
            if found in _OPENED
            else f"it is {found}, which this Pillow cannot decode. Install a newer one"
        )
    return f"it is {found}; {_accepted()}. Convert it to PNG, or decode it yourself and pass the PIL image"


def _accepted() -> str:
    return f"supported formats are {', '.join(sorted(FORMATS))}"


def _is_undecoded(image: ImageFile.ImageFile) -> bool:
    state = vars(image)
    return bool(image.tile) or state.get("_im", state.get("im")) is None
