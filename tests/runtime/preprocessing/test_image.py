"""Pixels equal the references' own, level by level, in every file format and mode."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from runtime.errors import ImageError, InputError
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing.image import decode, pixels_from_image, pixels_from_source, require_several
from runtime.preprocessing.jpeg import image_from_jpeg

RNG = np.random.default_rng(7)


def preprocessing(**changes):
    values = {
        "height": 64,
        "width": 64,
        "resize": "shortest",
        "interpolation": "bicubic",
        "order": "resize-convert",
        "crop_rounding": "round",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    return ImagePreprocessing(**{**values, **changes})


CLIP = preprocessing(order="convert-resize", crop_rounding="floor")


def noise(width, height, channels=3):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def scene(width=97, height=75, mode="RGB"):
    """Smooth areas, edges and noise, in any Pillow mode."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x * y) % 256], -1)
    rgb = np.where(((x // 9 + y // 7) % 2)[..., None] == 0, rgb, noise(width, height)).astype(np.uint8)
    image = Image.fromarray(rgb)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(noise(width, height, 1)))
    return image.convert(mode)


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def gif_of_three_frames():
    frames = [scene(60 + i, 50 + i).resize((60, 50)) for i in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=20)


def rotated_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(scene(), "JPEG", exif=exif)


def transparent_palette():
    image = scene().convert("P", palette=Image.Palette.ADAPTIVE)
    return saved(image, "PNG", transparency=bytes(range(0, 256)))


def sixteen_bits():
    return Image.fromarray(RNG.integers(0, 65536, (75, 97), dtype=np.uint16))


FILES = {
    "png": lambda: saved(scene(), "PNG"),
    "png-grey": lambda: saved(scene(mode="L"), "PNG"),
    "png-16-bit": lambda: saved(sixteen_bits(), "PNG"),
    "png-1-bit": lambda: saved(scene(mode="1"), "PNG"),
    "png-palette": lambda: saved(scene(mode="P"), "PNG"),
    "png-palette-one-transparent": lambda: saved(scene(mode="P"), "PNG", transparency=3),
    "png-palette-alpha": transparent_palette,
    "png-rgba": lambda: saved(scene(mode="RGBA"), "PNG"),
    "png-grey-alpha": lambda: saved(scene(mode="LA"), "PNG"),
    "png-rgb-transparent-colour": lambda: saved(scene(), "PNG", transparency=(0, 0, 0)),
    "jpeg": lambda: saved(scene(), "JPEG", quality=80),
    "jpeg-grey": lambda: saved(scene(mode="L"), "JPEG"),
    "jpeg-cmyk": lambda: saved(scene(mode="CMYK"), "JPEG"),
    "jpeg-progressive": lambda: saved(scene(), "JPEG", progressive=True),
    "jpeg-rotated-by-exif": rotated_by_exif,
    "jpeg-large": lambda: saved(scene(1600, 1203), "JPEG"),
    "gif": lambda: saved(scene(), "GIF"),
    "gif-animated": gif_of_three_frames,
    "webp": lambda: saved(scene(), "WEBP", lossless=True),
    "webp-alpha": lambda: saved(scene(mode="RGBA"), "WEBP", lossless=True),
    "bmp": lambda: saved(scene(), "BMP"),
    "tiff": lambda: saved(scene(), "TIFF"),
    "tiff-cmyk": lambda: saved(scene(mode="CMYK"), "TIFF", compression="tiff_lzw"),
    "tiff-float": lambda: saved(scene(mode="F"), "TIFF"),
    "tiff-lab": lambda: saved(scene(mode="LAB"), "TIFF"),
    "tiff-16-bit-big-endian": lambda: saved(sixteen_bits().convert("I;16B"), "TIFF"),
    "tiny": lambda: saved(scene(1, 1), "PNG"),
    "one-row": lambda: saved(scene(150, 1), "PNG"),
    "one-column": lambda: saved(scene(1, 151), "PNG"),
    "exact-size": lambda: saved(scene(64, 64), "PNG"),
    "odd-excess": lambda: saved(scene(64, 67), "PNG"),
    "odd-excess-wide": lambda: saved(scene(71, 64), "PNG"),
}


@pytest.fixture(params=FILES)
def file_bytes(request):
    return FILES[request.param]()


def open_clip_pixels(data, size, resize_mode, interpolation):
    transform = pytest.importorskip("open_clip.transform")
    configuration = transform.PreprocessCfg(
        size=size, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode, interpolation=interpolation
    )
    reference = transform.image_transform_v2(configuration, is_train=False)
    return np.rint(reference(Image.open(io.BytesIO(data))).numpy() * 255).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_pixels_equal_open_clip(file_bytes, resize, interpolation):
    expected = open_clip_pixels(file_bytes, 64, resize, interpolation)
    found = pixels_from_image(decode(file_bytes), preprocessing(resize=resize, interpolation=interpolation))
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(48, 64), (64, 37)])
def test_pixels_equal_open_clip_where_not_square(file_bytes, size, resize):
    expected = open_clip_pixels(file_bytes, size, resize, "bicubic")
    found = pixels_from_image(decode(file_bytes), preprocessing(height=size[0], width=size[1], resize=resize))
    np.testing.assert_array_equal(found, expected)


def transformers_pixels(module, name, data):
    processor = getattr(pytest.importorskip(f"transformers.models.clip.{module}"), name)(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        do_rescale=False,
        do_normalize=False,
    )
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(processor(image, return_tensors="np").pixel_values)[0]


def test_pixels_equal_transformers(file_bytes):
    expected = transformers_pixels("image_processing_pil_clip", "CLIPImageProcessorPil", file_bytes)
    np.testing.assert_array_equal(pixels_from_image(decode(file_bytes), CLIP), expected)


def test_pixels_are_near_those_of_transformers_tensor_resize(file_bytes):
    """torchvision resizes tensors with rounder weights than Pillow: a few levels in a few places."""
    expected = transformers_pixels("image_processing_clip", "CLIPImageProcessor", file_bytes)
    difference = np.abs(pixels_from_image(decode(file_bytes), CLIP).astype(int) - expected)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 80_000_000)])
def test_an_image_too_long_to_resize_is_refused(size):
    with pytest.raises(ImageError, match=r"when its shortest side is resized to 64.*Crop it first"):
        pixels_from_image(Image.new("1", size), preprocessing())


@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 1_000_000)])
def test_an_image_of_any_shape_can_be_squashed(size):
    pixels = pixels_from_image(Image.new("L", size, 7), preprocessing(resize="squash"))
    assert (pixels == 7).all()


@pytest.mark.parametrize("kind", ["str", "path", "bytes", "bytearray", "memoryview", "pil", "array"])
def test_every_kind_of_source_gives_the_same_pixels(tmp_path, kind):
    data = saved(scene(), "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(data)
    source = {
        "str": str(path),
        "path": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "pil": Image.open(path),
        "array": np.asarray(scene_of(data)),
    }[kind]
    expected = pixels_from_image(scene_of(data), preprocessing())
    np.testing.assert_array_equal(pixels_from_image(decode(source), preprocessing()), expected)


def scene_of(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).convert("RGB").getpixel((4, 4)) == (255, 0, 0)


def broken_png():
    data = bytearray(saved(scene(), "PNG"))
    data[60:90] = bytes(30)
    return bytes(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"not an image at all", "its format is unknown"),
        (saved(scene(), "JPEG")[:-400], "truncated|cannot be decoded"),
        (saved(scene(), "PNG")[:200], "truncated|cannot be decoded"),
        (saved(scene(), "PNG")[:20], "cannot be decoded"),
        (broken_png(), "cannot be decoded"),
        (zlib.compress(b"x" * 999), "its format is unknown"),
        ("no/such/file.png", "no/such/file.png does not exist"),
        (np.zeros((4, 4), np.uint8), r"uint8 \(height, width, 3\)"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((0, 4, 3), np.uint8), "non-empty"),
        (3.5, "of type float; expected a path"),
        (None, "of type NoneType; expected a path"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_an_error_that_says_why(source, message):
    with pytest.raises(ImageError, match=message):
        decode(source)


def test_an_error_names_the_image():
    with pytest.raises(ImageError, match="Image 3 of the batch, 5 bytes, cannot be decoded"):
        decode(b"bytes", name="3 of the batch, 5 bytes,")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(tmp_path)


def test_too_many_pixels_are_refused():
    data = saved(scene(20, 10), "PNG")
    assert decode(data, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageError, match="20×10 = 200 pixels; the limit is 199"):
        decode(data, max_pixels=199)


@pytest.mark.parametrize("width", [1100, 2100])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pillows_limit_is_an_error(monkeypatch, width):
    data = saved(Image.new("1", (width, 1)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="limit"):
        decode(data)


def test_a_callers_image_stays_open(tmp_path):
    path = tmp_path / "image.png"
    scene().save(path)
    with Image.open(path) as image:
        decode(image)
        assert image.getpixel((0, 0)) is not None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"image": ["a.png"]}, r"images is a table of type dict; pass one of its columns"),
        (None, "images is of type NoneType; expected an iterable"),
        (5, "images is of type int; expected an iterable"),
    ],
)
def test_a_table_is_not_several_images(images, message):
    with pytest.raises(InputError, match=message):
        require_several(images)


@pytest.mark.parametrize("single", ["a.png", b"x", Image.new("RGB", (1, 1)), np.zeros((4, 4, 3), np.uint8)])
def test_a_single_image_is_not_several(single):
    with pytest.raises(InputError, match="pass a list of images"):
        require_several(single)


def jpegs():
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        for size in ((640, 480), (480, 640), (97, 75), (1, 1), (16, 1), (3, 200)):
            for options in (
                {"quality": 60},
                {"quality": 95},
                {"progressive": True},
                {"restart_marker_rows": 1},
            ):
                yield saved(scene(*size), "JPEG", subsampling=subsampling, **options)


def test_the_fast_jpeg_decoder_gives_pillows_pixels():
    pytest.importorskip("simplejpeg")
    for data in jpegs():
        found = image_from_jpeg(data)
        assert found is not None
        np.testing.assert_array_equal(np.asarray(found), np.asarray(decode(data)))


@pytest.mark.parametrize("name", ["jpeg-grey", "jpeg-cmyk", "png", "webp"])
def test_what_the_fast_jpeg_decoder_leaves_to_pillow(name):
    assert image_from_jpeg(FILES[name]()) is None


def test_a_damaged_jpeg_is_an_error_on_the_fast_path_too():
    data = saved(scene(640, 480), "JPEG")
    for cut in (10, 200, len(data) // 2, len(data) - 30):
        with pytest.raises(ImageError):
            pixels_from_source(data[:cut], preprocessing())
    with pytest.raises(ImageError, match="limit is 100"):
        pixels_from_source(data, preprocessing(), max_pixels=100)


@pytest.mark.parametrize("changes", [{}, {"interpolation": "bilinear"}, {"resize": "squash"}, {"height": 48}])
def test_pixels_from_a_source_equal_those_from_its_image(file_bytes, changes):
    expected = pixels_from_image(decode(file_bytes), preprocessing(**changes))
    np.testing.assert_array_equal(pixels_from_source(file_bytes, preprocessing(**changes)), expected)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("seed", range(8))
def test_resizing_pass_by_pass_changes_no_pixel(mode, interpolation, seed):
    random = np.random.default_rng(seed)
    for _ in range(6):
        width, height = (int(side) for side in random.integers(1, 700, 2))
        if random.random() < 0.5:  # about the limit between the two orders of Pillow's passes
            height = max(1, int(width * random.uniform(0.9, 1.7)))
        side = int(random.integers(1, 230))
        image = Image.fromarray(noise(width, height)).convert(mode)
        short = min(width, height)
        size = (side, int(side * height / width)) if width == short else (int(side * width / height), side)
        resized = image.resize(size, getattr(Image.Resampling, interpolation.upper()))
        left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
        expected = np.asarray(resized.crop((left, top, left + side, top + side)).convert("RGB"))
        found = pixels_from_image(image, preprocessing(height=side, width=side, interpolation=interpolation))
        np.testing.assert_array_equal(found.transpose(1, 2, 0), expected)
