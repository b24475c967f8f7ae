"""Checks that the time of decoding a file is bounded by its length and its size in pixels.

They look at headers and at the structure of a file only. Pillow reads headers, and some formats as a whole,
in Python: a microsecond or more for each chunk, marker, block or sample, which a file of 30 MB repeats
millions of times.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

from PIL.PpmImagePlugin import MODES

from runtime.errors import ImageError

__all__ = ["require_bounded", "scans_of_jpeg"]

_MAX_SCANS = 100
"""Maximum scans of a JPEG. Encoders write up to 20; each scan, however short, decodes the whole image."""

_MAX_MARKERS = 4_096
"""Maximum markers before a JPEG's first scan; a profile or metadata of 30 MB has 500."""

_MAX_JUNK_BYTES = 1 << 16
"""Maximum bytes between a JPEG's markers, which Pillow skips one by one."""

_MAX_CHUNKS = 1 << 16
"""Maximum chunks of a PNG, and blocks before a GIF's first frame."""

_MAX_PYTHON_BYTES = 1 << 20
"""Maximum size of a PNM file that Pillow decodes sample by sample: half a second."""

_LONGEST_PNM_HEADER = 4_096

_MAX_RLE_BYTES, _MAX_RLE_PIXELS = 4 << 20, 4 << 20
"""Maximum size of an RLE-compressed BMP, which Pillow decodes run by run: a second."""

_MAX_TAGS = 4_096
_MAX_TAG_VALUES = 1 << 18
_MAX_STRIPS = 1 << 16
"""Maximum strips or tiles of a TIFF, each of which is a call of a decoder."""

_STRIP_TAGS = (273, 279, 324, 325)

_SHARED_TAG_BYTES = 1 << 20
"""Allowed bytes of a TIFF's tags beyond its length, since some writers let tags share values."""

_TAG_UNITS = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
"""Bytes per value by TIFF tag type."""

_BYTE_TYPES = (1, 2, 6, 7)
"""TIFF tag types whose values are read at once."""

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_NEXT_MARKER = re.compile(rb"[^\xff]*\xff+")
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xDA)})
"""JPEG markers without a length: TEM, RST, SOI and EOI."""
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
_START_OF_SCAN = 0xDA


def require_bounded(data: bytes, name: str) -> None:
    """Check that the decoding time is bounded by the file's length and its size in pixels.

    Args:
        name: Name of the image in error messages.

    Raises:
        ImageError: a JPEG has more than 100 scans, or fewer bits than its size needs; a file has too many
            markers, chunks, blocks, tags or strips; Pillow would decode a large one sample by sample; or a
            TIFF's tags are longer than its file.
    """
    fault = _fault(data)
    if fault:
        raise ImageError(f"Image {name} is a {fault}. Re-encode the file, for example as PNG.")


def scans_of_jpeg(data: bytes) -> int:
    """Number of scans of a JPEG, each of which decodes the whole image; 0 for other formats."""
    return data.count(b"\xff\xda") if data.startswith(b"\xff\xd8\xff") else 0


def _fault(data: bytes) -> str:
    """Return what is wrong with a file, in words; empty if nothing is."""
    checks: tuple[tuple[tuple[bytes, ...], Callable[[bytes], str]], ...] = (
        ((b"\xff\xd8\xff",), _fault_of_jpeg),
        ((b"\x89PNG\r\n\x1a\n",), _fault_of_png),
        ((b"GIF8",), _fault_of_gif),
        ((b"BM",), _fault_of_bmp),
        (_TIFF_SIGNATURES, _fault_of_tiff),
        ((b"P",), _fault_of_pnm),
    )
    try:
        return next((check(data) for signatures, check in checks if data.startswith(signatures)), "")
    except (struct.error, IndexError, OverflowError):
        return ""  # truncated: Pillow reports it


def _fault_of_jpeg(data: bytes) -> str:
    n_scans = scans_of_jpeg(data)
    if n_scans > _MAX_SCANS:
        return f"JPEG of {n_scans} scans; the limit is {_MAX_SCANS}, since each decodes the whole image again"
    at, n_junk = 2, 0
    for _ in range(_MAX_MARKERS):
        found = _NEXT_MARKER.match(data, at)
        if found is None or found.end() == len(data):
            n_junk += len(data) - at
            break
        n_junk += found.end() - at - 1
        marker, at = data[found.end()], found.end() + 1
        if n_junk > _MAX_JUNK_BYTES or marker == _START_OF_SCAN:
            break
        if marker == 0:
            n_junk += 2
        elif marker not in _BARE_MARKERS:
            (length,) = struct.unpack_from(">H", data, at)
            if marker in _HUFFMAN_FRAMES:
                height, width = struct.unpack_from(">HH", data, at + 3)
                n_blocks = (-(-height // 8)) * (-(-width // 8))
                if n_blocks > 8 * len(data):  # at least a bit each
                    return (
                        f"JPEG of {width}×{height} whose data end early: {len(data)} bytes cannot hold its "
                        f"{n_blocks} blocks"
                    )
            at += max(2, length)
    else:
        return f"JPEG of more than {_MAX_MARKERS} markers"
    if n_junk > _MAX_JUNK_BYTES:
        return f"JPEG with more than {_MAX_JUNK_BYTES} bytes between its markers"
    return ""


def _fault_of_png(data: bytes) -> str:
    at = 8
    for _ in range(_MAX_CHUNKS):
        if at + 4 > len(data):
            return ""
        (length,) = struct.unpack_from(">I", data, at)
        at += 12 + length
    return f"PNG of more than {_MAX_CHUNKS} chunks"


def _fault_of_gif(data: bytes) -> str:
    at = 13 + _palette_bytes(data[10])
    in_blocks = False
    for _ in range(_MAX_CHUNKS):
        if in_blocks:
            in_blocks = data[at] > 0
            at += 1 + data[at]
        elif data[at] == 0x21:  # an extension, whose label is followed by blocks
            at, in_blocks = at + 2, True
        elif data[at] == 0x2C:  # a frame, which is decoded at once
            return ""
        else:
            at += 1
    return f"GIF of more than {_MAX_CHUNKS} blocks before its first frame"


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _fault_of_bmp(data: bytes) -> str:
    (n_header,) = struct.unpack_from("<I", data, 14)
    if n_header < 40:
        return ""
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    is_rle = compression in (1, 2)
    if is_rle and (len(data) > _MAX_RLE_BYTES or abs(width * height) > _MAX_RLE_PIXELS):
        return (
            f"BMP of {width}×{abs(height)} and {len(data)} bytes, compressed by run lengths; the limits are "
            f"{_MAX_RLE_PIXELS} pixels and {_MAX_RLE_BYTES} bytes"
        )
    return ""


def _fault_of_tiff(data: bytes) -> str:
    n_bytes = 0
    for i, (tag, kind, n_values, size) in enumerate(_tags(data)):
        if i >= _MAX_TAGS:
            return f"TIFF of more than {_MAX_TAGS} tags"
        most = _MAX_STRIPS if tag in _STRIP_TAGS else _MAX_TAG_VALUES
        if n_values > most and kind not in _BYTE_TYPES and n_values * size <= len(data):
            return f"TIFF whose tag {tag} has {n_values} values; the limit is {most}"
        n_bytes += size * n_values
    if n_bytes > len(data) + _SHARED_TAG_BYTES:
        return f"TIFF of {len(data)} bytes whose tags claim {n_bytes} bytes"
    return ""


def _tags(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield tag, type, number and size of the values of a TIFF's first directory.

    The size is 0 if they are in the directory itself.
    """
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    header, count, entry = ("Q", "Q", "HHQ8x") if is_big else ("L", "H", "HHL4x")
    (at,) = struct.unpack_from(order + header, data, 8 if is_big else 4)
    (n_tags,) = struct.unpack_from(order + count, data, at)
    at += struct.calcsize(order + count)
    step = struct.calcsize(order + entry)
    for place in range(at, min(at + n_tags * step, len(data) - step + 1), step):
        tag, kind, n_values = struct.unpack_from(order + entry, data, place)
        unit = _TAG_UNITS.get(kind, 1)
        yield tag, kind, n_values, unit if n_values * unit > (8 if is_big else 4) else 0


def _fault_of_pnm(data: bytes) -> str:
    # Pillow drops a comment with the end of its line, within a number too.
    head = re.sub(rb"#[^\r\n]*[\r\n]", b"", data[:_LONGEST_PNM_HEADER])
    magic = re.match(rb"\w+", head)
    mode = MODES.get(magic[0]) if magic else None
    if magic is None or mode is None:
        return ""
    n_numbers = 2 if mode == "1" else 3
    numbers = re.match(rb"\w+(?:\s+[\d.eE+-]+){%d}\s" % n_numbers, head)
    if numbers is None:
        if len(data) <= _LONGEST_PNM_HEADER:
            return ""  # truncated: Pillow reports it
        return f"PNM whose header is damaged, or longer than {_LONGEST_PNM_HEADER} bytes"
    levels, is_text = numbers[0].split()[-1], magic[0] in (b"P1", b"P2", b"P3")
    is_raw = mode in "1F" or levels == b"255" or (mode == "L" and levels == b"65535")
    if len(data) > _MAX_PYTHON_BYTES and (is_text or not is_raw):
        which = "in text" if is_text else f"with values up to {levels.decode()}"
        return f"PNM of {len(data)} bytes {which}; the limit is {_MAX_PYTHON_BYTES}"
    return ""
