"""Files that would take long, or much memory, are refused by their structure; usual ones are not."""

from __future__ import annotations

import io
import struct
import threading
import zlib

import pytest
from PIL import Image
from serving import wait_until

from runtime.errors import ImageError
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing.image import decode, pixels_from_source
from runtime.preprocessing.image_work import DecodingMemory, costs_of_files
from runtime.preprocessing.served_limits import SERVED_BYTES, SERVED_PIXELS

PREPROCESSING = ImagePreprocessing(
    64, 64, "shortest", "bicubic", "resize-convert", "round", (0, 0, 0), (1, 1, 1)
)
MB = 1 << 20


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.effect_noise((400, 300), 80).convert("RGB")).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_chunks(n_chunks: int) -> bytes:
    whole = saved("PNG")
    return whole[:33] + chunk(b"tEXt", b"k\0a") * n_chunks + whole[33:]


def bmp(width: int, height: int, content: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 256)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + bytes(1024) + content


def tiff_of_strips(n_strips: int) -> bytes:
    tags = [(256, 1), (257, n_strips), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1)]
    entries = [(tag, 4, 1, value) for tag, value in tags] + [(273, 4, n_strips, 200), (279, 4, n_strips, 200)]
    head = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + head).ljust(200 + 4 * n_strips, b"\0")


def jpeg_with(junk: bytes) -> bytes:
    whole = saved("JPEG")
    return whole[:2] + junk + whole[2:]


def jpeg_that_claims(width: int, height: int) -> bytes:
    whole = bytearray(saved("JPEG"))
    at = whole.find(b"\xff\xc0")
    whole[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(whole)


LONG = {
    "levels": b"P5 2000 1000 254\n" + bytes(2_000_000),
    "colours": b"P6 1000 1000 254\n" + bytes(3_000_000),
    "wide levels": b"P5 1000 1000 65534\n" + bytes(2_000_000),
    "wide colours": b"P6 1000 1000 65535\n" + bytes(6_000_000),
    "levels split by a comment": b"P5 2000 1000 255#\n4\n" + bytes(2_000_000),
    "text": b"P3 1000 1000 255\n" + b"0 " * 3_000_000,
    "text bitmap": b"P1 2000 2000\n" + b"0" * 4_000_000,
    "comment": b"P6 #" + b"a" * MB + b"\n8 8 255\n" + bytes(192),
    "comment before floats": b"Pf #" + b"a" * MB + b"\n8 8 -1.0\n" + bytes(256),
    "comment before inks": b"P0CMYK #" + b"a" * MB + b"\n8 8 255\n" + bytes(256),
    "inks": b"P0CMYK 1000 500 254\n" + bytes(2_000_000),
    "whitespace": b"P6 " + b" " * MB + b"8 8 255\n" + bytes(192),
    "chunks": png_of_chunks(70_000),
    "markers": jpeg_with(b"\xff\xfe\0\2" * 5_000),
    "junk": jpeg_with(b"\xff\xfe\0\2" + b"a" * 70_000),
    "padding": jpeg_with(b"\xff" * 70_000),
    "runs": bmp(3_000, 2_000, b"\1\0" * 3_000_000),
    "short rows": bmp(9_400, 9_400, b"\1\0\0\0" * 9_400),
    "strips": tiff_of_strips(70_000),
    "gif": saved("GIF")[:13] + b"\x21\xf9\4\0\0\0\0\0" * 70_000 + saved("GIF")[13:],
}


@pytest.mark.parametrize("data", LONG.values(), ids=LONG)
def test_what_takes_long_for_its_size_is_refused(data: bytes) -> None:
    for way in (decode, lambda source: pixels_from_source(source, PREPROCESSING)):
        with pytest.raises(ImageError, match=r"Image of .* is a .*Re-encode the file"):
            way(data)


USUAL = {
    "levels": b"P5 100 100 254\n" + bytes(10_000),
    "large levels": b"P5 2000 1000 255\n" + bytes(2_000_000),
    "large wide levels": b"P5 2000 1000 65535\n" + bytes(4_000_000),
    "commented": b"P6 # by a camera\n 1000 # wide\n1000\n255\n" + bytes(3_000_000),
    "floats": b"Pf 1000 500 -1.0\n" + bytes(2_000_000),
    "large inks": b"P0CMYK 1000 500 255\n" + bytes(2_000_000),
    "bitmap": b"P4 8000 2000\n" + bytes(2_000_000),
    "text": b"P3 100 100 255\n" + b"0 " * 30_000,
    "chunks": png_of_chunks(1_000),
    "profile": jpeg_with((b"\xff\xfe" + struct.pack(">H", 65_535) + bytes(65_533)) * 200),
    "padding": jpeg_with(b"\xff" * 100),
    "runs": bmp(100, 100, b"\x64\1\0\0" * 100 + b"\0\1"),
    "strips": tiff_of_strips(1_000),
    "gif": saved("GIF"),
    "progressive": saved("JPEG", progressive=True),
    "grey": saved("JPEG", Image.new("L", (400, 300), 128)),
    "smallest": saved("JPEG", Image.new("RGB", (4_000, 3_000)), quality=1, optimize=True),
    "black": saved("JPEG", Image.new("L", (4_000, 3_000)), progressive=True, quality=1),
}


@pytest.mark.parametrize("data", USUAL.values(), ids=USUAL)
def test_usual_files_are_decoded(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as expected:
        assert decode(data).tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.3, 0.6])
def test_a_jpeg_whose_data_end_early_is_refused(kept: float, progressive: bool, mode: str) -> None:
    """Pillow fills the rest with grey if the file has an end: the library only warns."""
    whole = saved("JPEG", Image.effect_noise((400, 300), 80).convert(mode), progressive=progressive)
    at = int(len(whole) * (kept / 8 if progressive else kept))  # within the first scan
    cut = whole[: max(at, whole.find(b"\xff\xda") + 100)] + b"\xff\xd9"
    assert Image.open(io.BytesIO(cut)).tobytes()
    assert decode(whole)
    for way in (decode, lambda source: pixels_from_source(source, PREPROCESSING)):
        with pytest.raises(ImageError, match="data end early"):
            way(cut)


def test_a_jpeg_that_claims_more_than_it_can_hold_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(ImageError, match="JPEG of 9400×9400 whose data end early"):
        costs_of_files([jpeg_that_claims(9_400, 9_400)], PREPROCESSING, max_bytes=MB)


def white(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), 255 if mode in ("L", "1", "I;16") else "white")


@pytest.mark.parametrize(
    ("kind", "image", "options", "is_allowed"),
    [
        ("PNG", white(3_000, 4_000), {}, True),
        ("PNG", white(2_000, 7_500), {}, False),
        ("PNG", white(2_000, 6_500), {}, True),
        ("PNG", white(5_000, 5_000, "I;16"), {}, True),
        ("PNG", white(5_500, 5_500, "I;16"), {}, False),
        ("PNG", white(5_700, 5_700, "1"), {}, True),
        ("PNG", white(5_800, 5_800, "1"), {}, False),
        ("GIF", white(5_000, 5_000, "L"), {}, True),
        ("JPEG", white(2_300, 2_300), {"progressive": True}, True),
        ("TIFF", white(2_100, 2_100), {"compression": "tiff_lzw"}, True),
        ("TIFF", white(3_000, 3_000), {"compression": "tiff_lzw"}, False),
        ("AVIF", white(2_100, 2_100), {"speed": 10}, True),
        ("WEBP", white(1_800, 1_800), {"lossless": True, "method": 0}, True),
        ("WEBP", white(2_100, 2_100), {"lossless": True, "method": 0}, False),
    ],
)
def test_a_server_bounds_memory_by_format(
    kind: str, image: Image.Image, options: dict[str, object], is_allowed: bool
) -> None:
    data = saved(kind, image, **options)
    if is_allowed:
        (cost,) = costs_of_files([data], PREPROCESSING)
        assert cost.rows is not None or cost.n_bytes >= image.width * image.height
    else:
        with pytest.raises(ImageError, match="the limit is"):
            costs_of_files([data], PREPROCESSING)
    assert SERVED_PIXELS == 33_554_432


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_photographs_of_a_phone_are_allowed(options: dict[str, object]) -> None:
    pytest.importorskip("pyvips")
    for width, height in ((4_032, 3_024), (3_024, 4_032)):
        costs_of_files([saved("JPEG", white(width, height), **options)], PREPROCESSING)
    if not options:
        for kind in ("JPEG", "PNG"):
            costs_of_files([saved(kind, white(6_000, 4_000))], PREPROCESSING)


def test_files_count_as_often_as_they_are_in_memory() -> None:
    small = saved("PNG", white(100, 100))
    padded = small[:33] + chunk(b"teSt", bytes(6_000_000)) + small[33:]
    assert len(padded) < SERVED_BYTES
    costs_of_files([padded], PREPROCESSING)
    large = saved("WEBP", white(1_800, 1_800), lossless=True, method=0)
    costs_of_files([large], PREPROCESSING)
    for files in ([padded, padded], [large, padded]):
        with pytest.raises(ImageError, match=r"the limit is [0-9]+\. .* or send it alone"):
            costs_of_files(files, PREPROCESSING)
    costs_of_files([padded, padded, large], PREPROCESSING, max_memory_bytes=200_000_000)


def test_images_wait_for_memory_in_the_order_of_their_coming() -> None:
    memory, order = DecodingMemory(400), []
    begun = [threading.Event() for _ in range(3)]

    def take(i: int, n_bytes: int) -> None:
        begun[i].set()
        with memory.taken(n_bytes):
            order.append(i)

    with memory.taken(60):
        threads = [threading.Thread(target=take, args=one) for one in ((0, 1_000), (1, 10))]
        for i, thread in enumerate(threads):
            thread.start()
            wait_until(lambda i=i: len(memory._turns) == i + 1, "it waits")  # type: ignore[misc]
        assert not order
    for thread in threads:
        thread.join()
    assert order == [0, 1]
    with memory.taken(100):
        pass
