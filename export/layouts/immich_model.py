"""A model folder of immich, computed from strings and images as its service does, for the parity gate."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer as Subwords

from export.layouts.layout import ModelPlace
from export.towers import Float, Int
from runtime.backends import open_backend
from runtime.manifest import TOKENIZER_FILE, Engine, Precision
from runtime.preprocessing.batching import windows
from runtime.preprocessing.cleaning import clean_whitespace
from runtime.preprocessing.image import ImageSource, decode

__all__ = ["CODES_OF_IMMICH", "ImmichModel"]

CODES_OF_IMMICH: Mapping[str, str] = {"jpn_Jpan": "jpn_Hira", "lvs_Latn": "lav_Latn"}
"""Codes that the service passes in place of FLORES-200's, for Japanese and Latvian."""


class ImmichModel:
    """Both towers of a model folder, opened with the settings of the service; one row a run."""

    def __init__(self, folder: Path, place: ModelPlace, *, precision: Precision, threads: int | None) -> None:
        config, self._image = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("config.json", "visual/preprocess_cfg.json")
        )
        length = int(config["text_cfg"]["context_length"])
        textual = folder / "textual"
        pad_token = json.loads((textual / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"]
        self._subwords = Subwords.from_file(str(textual / TOKENIZER_FILE))
        self._subwords.enable_padding(
            length=length, pad_token=pad_token, pad_id=self._subwords.token_to_id(pad_token)
        )
        self._subwords.enable_truncation(max_length=length)
        self._has_languages = place.name.startswith("nllb")
        self._text, self._visual = (
            open_backend(
                Engine.ONNXRUNTIME, folder / part / "model.onnx", precision=precision, threads=threads
            )
            for part in ("textual", "visual")
        )

    def close(self) -> None:
        """Release both graphs."""
        self._text.close()
        self._visual.close()

    def token_ids(self, texts: Sequence[str], languages: Sequence[str | None]) -> Int:
        """Tokenize: int64 (texts, context length), with the ids of the tower's table."""
        ids = self._padded_ids(texts, languages)
        for code, passed in CODES_OF_IMMICH.items():
            first, second = self._subwords.token_to_id(code), self._subwords.token_to_id(passed)
            if first is not None and second is not None:
                ids[ids == second] = first
        return ids

    def _padded_ids(self, texts: Sequence[str], languages: Sequence[str | None]) -> Int:
        strings = [
            self._code(language) + " ".join(text.split())
            for text, language in zip(texts, languages, strict=True)
        ]
        return np.array([encoding.ids for encoding in self._subwords.encode_batch(strings)], np.int64)

    def _code(self, language: str | None) -> str:
        """Code that the service puts before a text of a FLORES-200 language."""
        if not self._has_languages or language is None:
            return ""
        return CODES_OF_IMMICH.get(language, language)

    def same_cleaning(self, text: str) -> bool:
        """Return True if collapsed white space is all that open_clip's cleaning does to a text."""
        return clean_whitespace(text) == " ".join(text.split())

    def pixels(self, image: Image.Image) -> Float:
        """Prepare an image: normalised float32 (3, height, width)."""
        size = int(self._image["size"][0])
        resampling = Image.Resampling[self._image["interpolation"].upper()]
        rgb = image.convert("RGB")
        if self._image["resize_mode"] == "squash":
            resized = rgb.resize((size, size), resampling)
        else:
            width, height = rgb.size
            scaled = (
                (size, int(height / width * size)) if width < height else (int(width / height * size), size)
            )
            left, top = (int(side / 2 - size / 2) for side in scaled)
            resized = rgb.resize(scaled, resampling).crop((left, top, left + size, top + size))
        mean, std = (np.array(self._image[key], np.float32) for key in ("mean", "std"))
        scaled_pixels = np.asarray(resized, np.float32) / np.float32(255)
        normalised: Float = scaled_pixels * (np.float32(1) / std) - mean / std
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))

    def embed_texts(
        self, texts: Iterable[str], language: Sequence[str] | None = None, *, dim: int | None = None
    ) -> Float:
        """Embed texts one by one: float32 (texts, dim)."""
        rows = list(texts)
        ids = self._padded_ids(rows, [None] * len(rows) if language is None else language)
        return np.concatenate(
            [self._text.run({"text": row[None]}, ["vector"])[0] for row in ids.astype(np.int32)]
        )

    def iter_images(
        self, images: Iterable[ImageSource], *, dim: int | None, batch_size: int
    ) -> Iterator[Float]:
        """Embed images one by one: yield float32 (batch, dim)."""
        for batch in windows(images, batch_size):
            pixels: list[Any] = [self.pixels(decode(image)) for image in batch]
            yield np.concatenate([self._visual.run({"image": row[None]}, ["vector"])[0] for row in pixels])
