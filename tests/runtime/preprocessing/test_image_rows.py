"""Images decoded and resized a few rows at a time: the same pixels, in little memory."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import ImageError
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing import image as image_module
from runtime.preprocessing.image import cost_of_file, decode, pixels_from_file, pixels_from_image
from runtime.preprocessing.image_formats import open_image
from runtime.preprocessing.image_rows import rows_of_file

pytest.importorskip("pyvips")

MODES = ("L", "LA", "RGB", "RGBA")
SIZES = ((300, 200), (90, 64), (64, 64), (640, 3), (50, 75), (901, 1_351), (1_999, 40), (17, 9))


def preprocessing(
    size: tuple[int, int] = (64, 64), resize: str = "shortest", order: str = "resize-convert"
) -> ImagePreprocessing:
    return ImagePreprocessing(size[1], size[0], resize, "bicubic", order, "round", (0, 0, 0), (1, 1, 1))


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    shape = (size[1], size[0], len(Image.new(mode, (1, 1)).getbands()))
    levels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, size, levels.tobytes())


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reference_pixels(data: bytes, wanted: ImagePreprocessing) -> np.ndarray:
    """Pixels by Pillow's resize of the whole image, as open_clip and transformers call it."""
    image = Image.open(io.BytesIO(data))
    if wanted.order == "convert-resize":
        white = Image.new("RGBA", image.size, "white")
        has_alpha = image.mode in ("LA", "RGBA") or "transparency" in image.info
        image = Image.alpha_composite(white, image.convert("RGBA")) if has_alpha else image
        image = image.convert("RGB")
    if wanted.resize == "squash":
        return np.asarray(
            image.resize((wanted.width, wanted.height), Image.Resampling.BICUBIC).convert("RGB")
        )
    side = wanted.width
    width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    left, top = (round((whole - side) / 2) for whole in size)
    resized = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    return np.asarray(resized.convert("RGB"))


@pytest.mark.parametrize("order", ["resize-convert", "convert-resize"])
@pytest.mark.parametrize("mode", [*MODES, "P", "1", "CMYK", "I;16"])
def test_pixels_are_those_of_a_whole_resize(mode: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "_LARGEST_WHOLE_BYTES", 0)
    n_by_rows = 0
    for size, resize in itertools.product(SIZES, ("shortest", "squash")):
        image = noise(mode if mode in MODES else "L", size)
        image = image if mode in MODES else image.convert("I" if mode == "I;16" else mode).convert(mode)
        files = [saved(image, "TIFF" if mode == "CMYK" else "PNG")]
        if mode in ("L", "RGB"):
            files += [
                saved(image, "JPEG", quality=50, progressive=progressive, subsampling=subsampling)
                for progressive in (False, True)
                for subsampling in ("4:4:4", "4:2:2", "4:2:0")
            ]
        for data in files:
            wanted = preprocessing(resize=resize, order=order)
            cost = cost_of_file(data, wanted, name="of the test")
            n_by_rows += cost.rows is not None
            expected = reference_pixels(data, wanted).transpose(2, 0, 1)
            found = pixels_from_file(data, wanted, cost, name="of the test", max_pixels=1 << 25)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(pixels_from_image(decode(data), wanted), expected)
    assert (n_by_rows > 0) == (mode in MODES)


def test_large_images_take_little_memory() -> None:
    wanted = preprocessing((224, 224))
    for kind, options in (("PNG", {}), ("JPEG", {})):
        data = saved(Image.new("RGB", (5_700, 5_700)), kind, **options)
        cost = cost_of_file(data, wanted, name="of the test")
        assert cost.rows is not None
        assert cost.n_bytes < 20_000_000
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_of_process("VmRSS")
        pixels_from_file(data, wanted, cost, name="of the test", max_pixels=1 << 25)
        assert memory_of_process("VmHWM") - before < 30_000_000


def memory_of_process(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (noise("P", (64, 64)), "PNG", {}),
        (noise("RGB", (64, 64)), "PNG", {"transparency": (1, 2, 3)}),
        (noise("L", (64, 64)), "PNG", {"transparency": 7}),
        (noise("L", (64, 64)).convert("I").convert("I;16"), "PNG", {}),
        (noise("CMYK", (64, 64)), "JPEG", {"quality": 50}),
        (noise("RGB", (64, 64)), "WEBP", {}),
        (noise("RGB", (64, 64)), "GIF", {}),
    ],
)
def test_pillow_decodes_what_libvips_takes_otherwise(
    image: Image.Image, kind: str, options: dict[str, object]
) -> None:
    data = saved(image, kind, **options)
    assert rows_of_file(data, open_image(data, name="of the test")) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_files_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "_LARGEST_WHOLE_BYTES", 0)
    whole = saved(noise("RGB", (400, 300)), kind)
    for part in (0.3, 0.6, 0.95):
        data = whole[: int(part * len(whole))]
        cost = cost_of_file(data, preprocessing(), name="of the test")
        assert cost.rows is not None
        with pytest.raises(ImageError, match="Image of the test cannot be decoded"):
            pixels_from_file(data, preprocessing(), cost, name="of the test", max_pixels=1 << 25)
