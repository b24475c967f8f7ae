"""The probes tell right from wrong: each setting that is turned makes at least one of them fail."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sample_models import CHECKPOINTS

from export import towers_from_checkpoint
from export.parity import measure as parity
from export.parity.expectations import Expectations, expected_of_reference
from export.parity.limits import limits_of
from export.parity.probe_set import probes_from_expected
from export.parity.probes import probe_files
from export.towers import Towers
from runtime.manifest import Engine, ImagePreprocessing, Precision
from runtime.preprocessing.image import pixels_from_image, pixels_from_source
from runtime.preprocessing.text import Tokenizer, TokenRow

NAMES = ("nllb-clip", "capivara", "altclip")
Pixels = Callable[[Any, ImagePreprocessing], Any]
Rows = Callable[[TokenRow, Towers], list[int]]


@cache
def sample(name: str) -> tuple[Towers, Expectations]:
    towers = towers_from_checkpoint(CHECKPOINTS / name)
    return towers, expected_of_reference(towers, 1)


def opened(source: Any) -> Image.Image:
    return Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source


def setting(**changes: Any) -> Pixels:
    return lambda source, image: pixels_from_source(source, dataclasses.replace(image, **changes))


def other(name: str, one: str, two: str) -> Pixels:
    """The other one of two values."""
    return lambda source, image: pixels_from_source(
        source, dataclasses.replace(image, **{name: two if getattr(image, name) == one else one})
    )


def after(change: Callable[[Any], Any]) -> Pixels:
    return lambda source, image: change(pixels_from_source(source, image))


def before(change: Callable[[Image.Image], Image.Image]) -> Pixels:
    return lambda source, image: pixels_from_image(change(opened(source)), image)


def on_black(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), rgba).convert("RGB")


def scaled_16_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode == "I;16" else image


def without_antialias(source: Any, image: ImagePreprocessing) -> Any:
    """Bilinear between the nearest pixels, as tensors are resized by default."""
    pixels = torch.from_numpy(np.asarray(opened(source).convert("RGB")).copy()).permute(2, 0, 1)[None].float()
    scale = max(image.height / pixels.shape[2], image.width / pixels.shape[3])
    size = [
        max(image.height, round(pixels.shape[2] * scale)),
        max(image.width, round(pixels.shape[3] * scale)),
    ]
    resized = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=False)
    top, left = (size[0] - image.height) // 2, (size[1] - image.width) // 2
    cropped = resized[0, :, top : top + image.height, left : left + image.width]
    return cropped.round().clamp(0, 255).numpy().astype(np.uint8)


WRONG_PIXELS: dict[str, Pixels] = {
    "blue first": after(lambda p: p[::-1]),
    "green and blue": after(lambda p: p[[0, 2, 1]]),
    "left for right": after(lambda p: p[:, :, ::-1]),
    "top for bottom": after(lambda p: p[:, ::-1]),
    "columns for rows": after(lambda p: p.transpose(0, 2, 1)),
    "half a turn": after(lambda p: p[:, ::-1, ::-1]),
    "one to the left": after(lambda p: np.roll(p, 1, axis=2)),
    "one down": after(lambda p: np.roll(p, 1, axis=1)),
    "bilinear": setting(interpolation="bilinear"),
    "lanczos": setting(interpolation="lanczos"),
    "nearest": setting(interpolation="nearest"),
    "no antialias": without_antialias,
    "crop rounded otherwise": other("crop_rounding", "floor", "round"),
    "squashed": setting(resize="squash"),
    "order": other("order", "resize-convert", "convert-resize"),
    "turned by EXIF": before(ImageOps.exif_transpose),
    "grey": before(lambda image: image.convert("L")),
    "on black": before(on_black),
    "16 bits scaled": before(scaled_16_bit),
}


@pytest.mark.parametrize("name", NAMES)
def test_right_pixels_agree(name: str) -> None:
    towers, expected = sample(name)
    assert parity._max_pixel_error(towers, expected) <= 1e-6


@pytest.mark.parametrize("what", WRONG_PIXELS)
@pytest.mark.parametrize("name", ["capivara", "altclip"])
def test_wrong_pixels_are_seen(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    towers, expected = sample(name)
    monkeypatch.setattr(parity, "pixels_from_source", WRONG_PIXELS[what])
    assert (
        parity._max_pixel_error(towers, expected)
        > limits_of(Precision.FP32, Engine.ONNXRUNTIME).max_pixel_error * 1.5
    )


def cut(row: TokenRow, towers: Towers, *, context: int, left: bool = False) -> list[int]:
    """Cut a row anew, of the ids that it would have without a limit."""
    text = towers.text_preprocessing
    n_before, n_after = 1 if text.needs_language else len(text.prefix_ids), len(text.suffix_ids)
    room = context - n_before - n_after
    inner = row.ids[n_before : len(row.ids) - n_after]
    inner = inner[max(0, len(inner) - room) :] if left else inner[:room]
    return [*row.ids[:n_before], *inner, *row.ids[len(row.ids) - n_after :]]


WRONG_ROWS: dict[str, Rows] = {
    "cut on the left": lambda row, t: cut(row, t, context=t.text_preprocessing.context_length, left=True),
    "one shorter": lambda row, t: cut(row, t, context=t.text_preprocessing.context_length - 1),
    "one longer": lambda row, t: cut(row, t, context=t.text_preprocessing.context_length + 1),
    "the end cut off": lambda row, t: (
        [*row.ids, 0][: t.text_preprocessing.context_length] if not row.truncated else [*row.ids[:-1], 5]
    ),
    "language last": lambda row, t: [*row.ids[1:], row.ids[0]],
    "padded on the left": lambda row, t: (
        [t.text_preprocessing.pad_id] * (t.text_preprocessing.context_length - len(row.ids)) + row.ids
    ),
    "reversed": lambda row, t: row.ids[::-1],
}


def uncut(towers: Towers) -> Any:
    return dataclasses.replace(towers.text_preprocessing, context_length=10_000)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", [None, *WRONG_ROWS])
def test_wrong_token_rows_are_seen(
    name: str, what: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers, expected = sample(name)
    (tmp_path / "tokenizer.json").write_text(towers.tokenizer_json, encoding="utf-8")
    whole = what in ("cut on the left", "one longer")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", uncut(towers) if whole else towers.text_preprocessing)
    honest = tokenizer.rows_from_texts

    def wrong(texts: Any) -> list[TokenRow]:
        rows = honest(texts)
        return rows if what is None else [TokenRow(WRONG_ROWS[what](r, towers), r.truncated) for r in rows]

    monkeypatch.setattr(tokenizer, "rows_from_texts", wrong)
    equal = parity._token_ids_equal(tokenizer, expected, towers.text_preprocessing.pad_id)
    assert equal is (what is None)


WRONG_TEXTS: dict[str, Callable[[str], str]] = {
    "lower case": str.lower,
    "spaces kept": lambda text: text.replace(" ", "  x"),
    "entities kept": lambda text: text.replace("&amp;", "& amp ;"),
    "special tokens as words": lambda text: text.replace("<pad>", "< pad >"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", WRONG_TEXTS)
def test_wrongly_cleaned_texts_are_seen(name: str, what: str, tmp_path: Path) -> None:
    towers, expected = sample(name)
    (tmp_path / "tokenizer.json").write_text(towers.tokenizer_json, encoding="utf-8")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", towers.text_preprocessing)
    probes = [dataclasses.replace(p, text=WRONG_TEXTS[what](p.text)) for p in expected.probes]
    turned = dataclasses.replace(expected, probes=probes)
    assert not parity._token_ids_equal(tokenizer, turned, towers.text_preprocessing.pad_id)


@pytest.mark.parametrize("name", NAMES)
def test_texts_lie_at_both_sides_of_the_context_length(name: str) -> None:
    towers, expected = sample(name)
    pad, context = towers.text_preprocessing.pad_id, towers.text_preprocessing.context_length
    lengths = [int((row != pad).sum()) for row in expected.ids[-9:]]
    assert lengths == [context - 1, *[context] * 8]
    last = expected.ids[-8:, -2]  # of a text that just fits, of longer ones, and of those far over it
    assert last[0] == last[1] == last[2]
    assert len({tuple(row) for row in expected.ids[-6:]}) == 6


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_an_ignored_mask_is_seen(name: str) -> None:
    towers, expected = sample(name)
    rows = np.flatnonzero(expected.ids[:, 12] == towers.text_preprocessing.pad_id)[:64]
    ids = torch.from_numpy(expected.ids[rows][:, :16])
    found = towers.text(ids, torch.ones_like(ids))[0].numpy()
    if towers.text.hidden_id is not None:
        towers.text.hidden_id = None
        found = towers.text(ids, torch.ones_like(ids))[0].numpy()
        towers.text.hidden_id = towers.text_preprocessing.pad_id
    error = np.abs(found - expected.texts[towers.dim][rows]).max()
    assert error > 10 * limits_of(Precision.FP32, Engine.ONNXRUNTIME).max_abs_error


@pytest.mark.parametrize("name", NAMES)
def test_the_probe_set_stays_small(name: str, tmp_path: Path) -> None:
    towers, expected = sample(name)
    probes_from_expected(expected, towers).save(tmp_path / "probes.npz")
    assert (tmp_path / "probes.npz").stat().st_size < 1_000_000


@pytest.mark.parametrize("side", [64, 224, 240, 336, 378, 384])
def test_crops_begin_at_half_a_pixel_at_every_size(side: int) -> None:
    towers, _ = sample("capivara")
    image = dataclasses.replace(towers.image_preprocessing, height=side, width=side)
    sources = probe_files(image)
    apart = [
        np.abs(
            pixels_from_source(source, dataclasses.replace(image, crop_rounding="round")).astype(int)
            - pixels_from_source(source, dataclasses.replace(image, crop_rounding="floor"))
        )
        for source in sources
    ]
    turned = [source for source, error in zip(sources, apart, strict=True) if error.max() > 2]
    assert {opened(source).width > opened(source).height for source in turned} == {True, False}
