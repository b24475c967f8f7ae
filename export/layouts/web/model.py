"""Written page, computed from its files by ONNX Runtime here, for the gate and the exporter's check."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from export.layouts.layout import LayoutRequest
from export.layouts.web.assets import write_joined
from export.layouts.web.gallery import vectors_of_images
from export.layouts.web.probes import vectors_of_rows
from export.parity.expectations import channel_statistics
from export.towers import Float, Int
from runtime.backends import open_backend
from runtime.manifest import TOKENIZER_FILE, Engine, Modality
from runtime.preprocessing.image import ImageSource, pixels_from_image
from runtime.preprocessing.text import Tokenizer, texts_with_languages

__all__ = ["SITE_FILE", "WebModel"]

SITE_FILE = "site.json"
"""File that names all others of the page, with their checksums."""


class WebModel:
    """Text tower and tokenizer of a page, joined from its parts; the image tower that embedded its gallery.

    Texts are prepared by the runtime's tokenizer. The page's own is compared with it where it runs.
    """

    def __init__(self, request: LayoutRequest) -> None:
        self._towers = towers = request.towers
        site = json.loads((request.folder / SITE_FILE).read_text(encoding="utf-8"))
        self._files = tempfile.TemporaryDirectory()
        folder = Path(self._files.name)
        names = {"graph": "model.onnx", "tokenizer": TOKENIZER_FILE, "weights": site["weights_name"]}
        for asset, name in names.items():
            if asset in site["assets"]:
                write_joined(request.folder, site["assets"][asset], folder / name)
        self._tokenizer = Tokenizer(folder / TOKENIZER_FILE, towers.text_preprocessing)
        self._text, self._image = (
            open_backend(Engine.ONNXRUNTIME, graph, precision=request.precision, threads=request.threads)
            for graph in (folder / "model.onnx", request.graphs[Modality.IMAGE])
        )

    def close(self) -> None:
        """Release both graphs."""
        self._text.close()
        self._image.close()
        self._files.cleanup()

    def token_ids(self, texts: Sequence[str], languages: Sequence[str]) -> Int:
        """Tokenize: int64 (texts, context length)."""
        text = self._towers.text_preprocessing
        ids = np.full((len(texts), text.context_length), text.pad_id, np.int64)
        for row, one in zip(ids, self._rows(texts, languages), strict=True):
            row[: len(one)] = one
        return ids

    def _rows(self, texts: Iterable[str], languages: Sequence[str] | None) -> list[list[int]]:
        asked = list(texts_with_languages(texts, languages))
        return [row.ids for row in self._tokenizer.rows_from_texts(asked)]

    def same_cleaning(self, text: str) -> bool:
        """Return True: texts are cleaned by the runtime here."""
        return True

    def pixels(self, image: Image.Image) -> Float:
        """Prepare an image: normalised float32 (3, height, width)."""
        mean, std = channel_statistics(self._towers.image_preprocessing)
        pixels = pixels_from_image(image, self._towers.image_preprocessing).astype(np.float32)
        normalised: Float = (pixels / np.float32(255) - mean) / std
        return normalised

    def vectors_of_rows(self, rows: Sequence[Sequence[int]], output: str) -> Float:
        """Embed rows of token ids one by one: float32 (rows, dim)."""
        return vectors_of_rows(self._text, self._towers, rows, output)

    def embed_texts(
        self, texts: Iterable[str], language: Sequence[str] | None = None, *, dim: int | None = None
    ) -> Float:
        """Embed texts one by one, at full width: float32 (texts, dim)."""
        return self.vectors_of_rows(self._rows(texts, language), "vector")

    def iter_images(
        self, images: Iterable[ImageSource], *, dim: int | None, batch_size: int
    ) -> Iterator[Float]:
        """Embed images at full width; yield float32 (batch, dim)."""
        preprocessing = self._towers.image_preprocessing
        yield from vectors_of_images(self._image, preprocessing, images, batch_size=batch_size)
