"""Formats that are decoded, those that are refused, and the work that a file may ask for."""

from __future__ import annotations

import ast
import io
import os
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, GifImagePlugin, Image, ImageFile, TiffImagePlugin
from sample_models import ROOT

from runtime.errors import ImageError
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing.image import decode, pixels_from_source, snapshot_from_source
from runtime.preprocessing.image_formats import (
    FORMATS,
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    RAW_SUFFIXES,
    format_of_bytes,
    open_image,
)
from runtime.remote.payloads import bytes_from_image
from runtime.search.pictures import data_uri

PREPROCESSING = ImagePreprocessing(
    16, 16, "shortest", "bicubic", "resize-convert", "round", (0, 0, 0), (1, 1, 1)
)


def scene(size: tuple[int, int] = (40, 30)) -> Image.Image:
    colours = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or scene()).save(file, kind, **options)
    return file.getvalue()


def mpo() -> bytes:
    return saved("MPO", save_all=True, append_images=[scene().rotate(180)])


ACCEPTED = {
    **{name: lambda name=name: saved(name) for name in FORMATS if name != "MPO"},
    "MPO": mpo,
    "apng": lambda: saved("PNG", save_all=True, append_images=[scene().rotate(180)]),
    "bigtiff": lambda: saved("TIFF", big_tiff=True),
    "jpeg-progressive": lambda: saved("JPEG", progressive=True),
    "tiff-lzw": lambda: saved("TIFF", compression="tiff_lzw"),
    "tiff-jpeg": lambda: saved("TIFF", compression="jpeg"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_formats_give_what_pillow_alone_gives(name: str, tmp_path: Path) -> None:
    data = ACCEPTED[name]()
    expected = Image.open(io.BytesIO(data))
    found = decode(data)
    assert (found.mode, found.tobytes()) == (expected.mode, expected.tobytes())
    (tmp_path / "misnamed.xyz").write_bytes(data)
    assert decode(tmp_path / "misnamed.xyz").tobytes() == expected.tobytes()
    assert decode(Image.open(io.BytesIO(data))).tobytes() == expected.tobytes()
    assert format_of_bytes(data) in (
        expected.format,
        "JPEG",
        None,
    )  # MPO starts as JPEG; PPM is told by Pillow


def test_every_format_has_a_reason() -> None:
    assert all(form.use.strip() for form in FORMATS.values())


def test_files_are_found_by_every_suffix_that_pillow_knows_for_a_format() -> None:
    Image.init()
    known = {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS}
    assert known <= IMAGE_SUFFIXES
    others = {suffix for suffix, name in Image.EXTENSION.items() if name not in FORMATS}
    assert not (IMAGE_SUFFIXES & (others | OTHER_IMAGE_SUFFIXES | RAW_SUFFIXES))


def test_the_page_on_corpora_lists_every_format_and_suffix() -> None:
    page = (Path(__file__).parents[3] / "docs" / "corpora.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("| folders of images |")]
    assert set(re.findall(r"`(\.\w+)`", line.split(";")[0])) == IMAGE_SUFFIXES
    (listed,) = re.findall(r"Images are (.*?) files, of which the first frame", page, re.DOTALL)
    assert set(re.findall(r"\w+", listed.upper())) - {"OR"} == set(FORMATS) - {"MPO"}


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%Pages: 1\n%%EndComments\n"
REFUSED = {
    "EPS": (EPS + b"showpage\n", "EPS or PostScript"),
    "EPS with a preview": (b"\xc5\xd0\xd3\xc6" + struct.pack("<LL", 12, len(EPS)) + EPS, "EPS"),
    "PDF": (b"%PDF-1.7\n%rest", "PDF"),
    "PDF behind a line": (b"\n\n%PDF-1.7\n%rest", "PDF"),
    "PSD": (b"8BPS\0\1" + bytes(30), "PSD"),
    "FITS": (b"SIMPLE  =                    T" + b" " * 50 + b"END" + bytes(100), "FITS"),
    "ICO": (lambda: saved("ICO"), "ICO"),
    "ICNS": (lambda: saved("ICNS", scene((32, 32))), "ICNS"),
    "JPEG 2000": (lambda: saved("JPEG2000"), "JPEG 2000"),
    "JPEG 2000 codestream": (lambda: saved("JPEG2000", no_jp2=True), "JPEG 2000"),
    "DDS": (lambda: saved("DDS"), "DDS"),
    "SGI": (lambda: saved("SGI"), "SGI"),
    "MSP": (lambda: saved("MSP", scene().convert("1")), "MSP"),
    "QOI": (lambda: saved("QOI"), "QOI"),
    "BLP": (lambda: saved("BLP", scene().convert("P")), "BLP"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
    "HEIC in another brand": (b"\0\0\0\x18ftypmif1" + bytes(40), "HEIC"),
    "JPEG XL": (b"\xff\x0a" + bytes(40), "JPEG XL"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "an error page": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "a video": (b"\0\0\0\x18ftypisom" + bytes(40), "MP4 video"),
    "an archive": (b"PK\3\4" + bytes(40), "ZIP"),
    "WMF": (b"\xd7\xcd\xc6\x9a" + bytes(60), "WMF"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
}


def refused(name: str) -> bytes:
    data = REFUSED[name][0]
    return data() if callable(data) else data


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_by_their_name(name: str) -> None:
    message = (
        rf"Image 7 cannot be decoded: it is {REFUSED[name][1]}; supported formats are AVIF, BMP.*WEBP.*PNG"
    )
    with pytest.raises(ImageError, match=message):
        decode(refused(name), name="7")


@pytest.mark.parametrize("kind", ["TGA", "PCX", "IM", "SPIDER", "XBM"])
def test_formats_without_a_mark_are_refused_too(kind: str) -> None:
    image = scene().convert({"XBM": "1", "SPIDER": "F"}.get(kind, "RGB"))
    with pytest.raises(ImageError, match=r"(its format is unknown|it is TGA); supported formats are AVIF"):
        decode(saved(kind, image))


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in that writes down that it was called."""
    called, folder = tmp_path / "called", tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f'#!/bin/sh\necho "$@" >> {called}\nexit 1\n')
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    monkeypatch.setattr(EpsImagePlugin, "gs_windows_binary", None)
    yield called
    EpsImagePlugin.gs_binary = None


@pytest.mark.parametrize("name", ["EPS", "EPS with a preview"])
def test_ghostscript_is_never_run(ghostscript: Path, tmp_path: Path, name: str) -> None:
    data = refused(name)
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    ways: list[Callable[[], object]] = [
        lambda: decode(data),
        lambda: decode(path),
        lambda: pixels_from_source(data, PREPROCESSING),
        lambda: decode(Image.open(io.BytesIO(data))),
        lambda: snapshot_from_source(Image.open(path)),
        lambda: bytes_from_image(Image.open(io.BytesIO(data)), name="0"),
        lambda: data_uri(data),
        lambda: open_image(data, name="0"),
    ]
    for way in ways:
        with pytest.raises(ImageError, match="EPS"):
            way()
    assert not ghostscript.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 - any: what counts is that the stand-in works
        Image.open(io.BytesIO(data)).load()
    assert ghostscript.exists()


@pytest.mark.parametrize("kind", ["JPEG2000", "QOI", "TGA", "PCX"])
def test_a_callers_image_of_another_format_must_be_decoded_before(kind: str) -> None:
    image = Image.open(io.BytesIO(saved(kind)))
    message = (
        rf"Image 3 has format {kind} and is not decoded yet; supported formats are AVIF.*image\.load\(\)"
    )
    with pytest.raises(ImageError, match=message):
        decode(image, name="3")
    image.load()
    assert decode(image, name="3").tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "BMP"])
def test_a_damaged_header_is_no_other_format(kind: str) -> None:
    data = saved(kind)
    keep = 12 if kind in ("AVIF", "WEBP") else 8
    with pytest.raises(ImageError, match=r"Image 1 cannot be decoded: .*"):
        decode(data[:keep] + bytes(100), name="1")


def truncated(kind: str) -> bytes:
    data = saved(kind, scene((400, 300)))
    return data[: len(data) // 2]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "BMP", "PPM"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_a_truncated_file_is_refused_whatever_pillow_is_told(
    monkeypatch: pytest.MonkeyPatch, kind: str, tolerant: bool
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    data = truncated(kind)
    for way in (decode, lambda source: pixels_from_source(source, PREPROCESSING)):
        with pytest.raises(
            ImageError, match="LOAD_TRUNCATED_IMAGES is set" if tolerant else "cannot be decoded"
        ):
            way(data)


def test_under_tolerance_only_decoded_images_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    lazy = Image.open(io.BytesIO(truncated("JPEG")))
    with pytest.raises(ImageError, match=r"LOAD_TRUNCATED_IMAGES is set.*image\.load\(\)"):
        decode(lazy)
    lazy.load()
    assert decode(lazy).size == (400, 300)
    assert decode(np.zeros((4, 4, 3), np.uint8)).size == (4, 4)


# --- work -----------------------------------------------------------------------------------------------


def test_a_jpeg_of_many_scans_is_refused() -> None:
    data = saved("JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    assert decode(data[:-2] + scan * 20 + b"\xff\xd9").size == (40, 30)
    bomb = data[:-2] + scan * 5_000 + b"\xff\xd9"
    for way in (decode, lambda source: pixels_from_source(source, PREPROCESSING)):
        with pytest.raises(ImageError, match=r"JPEG of 50\d\d scans; the limit is 100"):
            way(bomb)


def tiff_of_tags(n_tags: int, n_bytes: int, *, order: str = "<", big: bool = False) -> bytes:
    """Every tag claims the same bytes of the file."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "L", 8)
    entry, count = ("HHQQ", "Q") if big else ("HHLL", "H")
    at = len(head) + struct.calcsize(order + count) + n_tags * struct.calcsize(order + entry)
    tags = [struct.pack(order + entry, 40_000 + i, 7, n_bytes, at) for i in range(n_tags)]
    return head + struct.pack(order + count, n_tags) + b"".join(tags) + bytes(8) + bytes(n_bytes)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.filterwarnings("error")
def test_a_tiff_whose_tags_are_longer_than_it_is_refused(order: str, big: bool) -> None:
    with pytest.raises(ImageError, match=r"is a TIFF of \d+ bytes whose tags claim 400000000 bytes"):
        decode(tiff_of_tags(4_000, 100_000, order=order, big=big))


@pytest.mark.parametrize("cut", [3, 5, 8, 9, 15, 40])
def test_a_tiff_cut_in_its_directory_is_an_error(cut: int) -> None:
    with pytest.raises(ImageError):
        decode(tiff_of_tags(3, 10)[:cut])
    with pytest.raises(ImageError):
        decode(b"II*\0" + b"\xff" * cut)
    with pytest.raises(ImageError):
        decode(b"II+\0" + b"\xff" * cut)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("kind", "start"), [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")]
)
def test_a_png_whose_texts_swell_is_refused(kind: bytes, start: bytes) -> None:
    png = saved("PNG")
    swollen = chunk(kind, start + zlib.compress(bytes(200 << 20), 9))
    with pytest.raises(ImageError, match=r"too large|Too much"):
        decode(png[:33] + swollen + png[33:])


def test_a_png_of_many_texts_is_refused() -> None:
    png = saved("PNG")
    texts = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(80))
    with pytest.raises(ImageError, match="Too much memory used in text chunks"):
        decode(png[:33] + texts + png[33:])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_only_the_first_frame_of_thousands_is_decoded(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    first, others = scene((8, 8)), [Image.new("RGB", (8, 8), (i % 256, i // 256, 0)) for i in range(3_000)]
    data = saved(kind, first, save_all=True, append_images=others)
    sought: list[int] = []
    for plugin in (GifImagePlugin.GifImageFile, TiffImagePlugin.TiffImageFile):
        seek = plugin._seek
        monkeypatch.setattr(
            plugin,
            "_seek",
            lambda self, frame, *rest, seek=seek: (sought.append(frame), seek(self, frame, *rest)),
        )
    started = time.process_time()
    found = decode(data)
    assert time.process_time() - started < 0.5
    assert set(sought) <= {0}
    assert found.convert("RGB").tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def png_of(width: int, height: int) -> bytes:
    header = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=r"limit.*(trust the file|bombs)|cannot be decoded"):
        decode(png_of(*size))
    with pytest.raises(ImageError, match=r"limit of|the limit is"):
        data_uri(png_of(20_000, 20_000))


def test_a_callers_lazy_image_of_too_many_pixels_is_not_decoded() -> None:
    lazy = Image.open(io.BytesIO(saved("PNG", scene((100, 50)))))
    with pytest.raises(ImageError, match="Image 2 has 100×50 = 5000 pixels; the limit is 4999"):
        decode(lazy, name="2", max_pixels=4_999)
    assert lazy.tile  # still to be decoded
    with pytest.raises(ImageError, match="the limit is 11"):
        decode(np.zeros((3, 4, 3), np.uint8), max_pixels=11)


# --- one home -------------------------------------------------------------------------------------------

_HOMES = {"runtime/preprocessing/image_formats.py"}
_FIXED = {"bench/peers/isolated/loops/pictures.py", "samples/dataset.py", "samples/sources.py"}
"""Run without this project's runtime; each names its formats."""


def opening_calls(source: str) -> Iterator[ast.Call]:
    """Calls that let Pillow choose a decoder, under whatever name."""
    tree = ast.parse(source)
    modules, functions = {"Image", "PIL.Image"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "PIL":
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "Image"}
        elif isinstance(node, ast.ImportFrom) and node.module in ("PIL.Image", "PIL.ImageFile"):
            functions |= {a.asname or a.name for a in node.names if a.name in ("open", "Parser")}
        elif isinstance(node, ast.Import):
            modules |= {alias.asname for alias in node.names if alias.name == "PIL.Image" and alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            owner, _, attribute = name.rpartition(".")
            if (attribute == "open" and owner in modules) or name in functions or attribute == "Parser":
                yield node


@pytest.mark.parametrize(
    ("source", "n_found"),
    [
        ("from PIL import Image\nImage.open(x)", 1),
        ("from PIL import Image as I\nI.open(x)", 1),
        ("import PIL.Image\nPIL.Image.open(x)", 1),
        ("import PIL.Image as P\nP.open(x)", 1),
        ("from PIL.Image import open as o\no(x)", 1),
        ("from PIL import ImageFile\nImageFile.Parser()", 1),
        ("open(x)\npath.open()\nImage.fromarray(x)", 0),
    ],
)
def test_calls_that_open_images_are_found(source: str, n_found: int) -> None:
    assert len(list(opening_calls(source))) == n_found


def test_images_are_opened_in_one_place() -> None:
    opened: dict[str, list[ast.Call]] = {}
    for folder in ("runtime", "export", "triton_models", "bench", "samples"):
        for path in (ROOT / folder).rglob("*.py"):
            if calls := list(opening_calls(path.read_text(encoding="utf-8"))):
                opened[path.relative_to(ROOT).as_posix()] = calls
    assert set(opened) == _HOMES | _FIXED
    for calls in opened.values():
        assert len(calls) == 1
        assert [keyword.arg for keyword in calls[0].keywords] == ["formats"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"x\.png cannot be decoded: it is not a regular file"):
        decode(tmp_path / "x.png")
