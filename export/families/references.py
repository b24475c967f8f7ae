"""Parity references: tokenizer, preprocessing and model of each family's own library, unmodified."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from export.towers import Float, Int, MrlHeads, unit
from runtime.errors import LanguageError

__all__ = [
    "AltClipReference",
    "MClipReference",
    "NllbClipReference",
    "OpenClipReference",
    "UnmaskedReference",
]

_BATCH = 32


class _Embedding:
    """Base class of the references: batched inference and L2 normalisation."""

    heads: MrlHeads

    def token_ids(self, texts: Sequence[str], languages: Sequence[str | None]) -> Int:
        raise NotImplementedError

    def pixels(self, image: Image.Image) -> Float:
        raise NotImplementedError

    def _text_features(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def _image_features(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def text_vectors(self, ids: Int) -> dict[int, Float]:
        """Embed padded int64 ids (texts, any length) to unit float32 (texts, dim), keyed by dim."""
        return self._vectors(self._text_features, torch.from_numpy(np.ascontiguousarray(ids)))

    def image_vectors(self, pixels: Float) -> dict[int, Float]:
        """Embed float32 pixels (images, 3, height, width) to unit float32 (images, dim), keyed by dim."""
        return self._vectors(self._image_features, torch.from_numpy(np.ascontiguousarray(pixels)))

    def embed_texts(self, texts: Sequence[str], languages: Sequence[str | None]) -> Float:
        """Embed texts, padded to the context length as the library does, to unit float32 (texts, dim)."""
        batches = [
            self.text_vectors(self.token_ids(texts[i : i + _BATCH], languages[i : i + _BATCH]))
            for i in range(0, len(texts), _BATCH)
        ]
        return np.concatenate([batch[max(batch)] for batch in batches])

    def embed_images(self, images: Sequence[Image.Image]) -> Float:
        """Embed images to unit float32 (images, dim)."""
        batches = [
            self.image_vectors(np.stack([self.pixels(image) for image in images[i : i + _BATCH]]))
            for i in range(0, len(images), _BATCH)
        ]
        return np.concatenate([batch[max(batch)] for batch in batches])

    @torch.inference_mode()
    def _vectors(self, features_of: Callable[[Tensor], Tensor], inputs: Tensor) -> dict[int, Float]:
        features = features_of(inputs)
        outputs = (unit(features), *self.heads(features))
        return {output.shape[1]: output.numpy() for output in outputs}


class OpenClipReference(_Embedding):
    """Parity reference from open_clip's ``HFTokenizer``, ``image_transform_v2`` and towers."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        transform: Callable[[Image.Image], Tensor],
        text: nn.Module,
        visual: nn.Module,
        heads: MrlHeads,
        needs_language: bool,
    ) -> None:
        self.tokenizer, self.transform, self.text, self.visual = tokenizer, transform, text, visual
        self.heads, self.needs_language = heads, needs_language

    def token_ids(self, texts: Sequence[str], languages: Sequence[str | None]) -> Int:
        """Tokenize to int64 (texts, context length), with one tokenizer call per language."""
        if not texts:
            return np.empty((0, self.tokenizer.context_length), np.int64)
        if not self.needs_language:
            return np.asarray(self.tokenizer(list(texts)), np.int64)
        rows = np.empty((len(texts), self.tokenizer.context_length), np.int64)
        for language in dict.fromkeys(languages):
            if language is None:
                raise LanguageError("NLLB needs a language for each text; pass its FLORES-200 code.")
            chosen = [i for i, own in enumerate(languages) if own == language]
            # Not open_clip's set_language: transformers 5 resets it at every call, so that all texts
            # get the language of src_lang (English by default).
            self.tokenizer.tokenizer.src_lang = language
            rows[chosen] = np.asarray(self.tokenizer([texts[i] for i in chosen]), np.int64)
        return rows

    def pixels(self, image: Image.Image) -> Float:
        """Preprocess an image to normalised float32 (3, height, width)."""
        return np.asarray(self.transform(image), np.float32)

    def _text_features(self, ids: Tensor) -> Tensor:
        features: Tensor = self.text(ids)
        return features

    def _image_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.visual(pixels)
        return features


class AltClipReference(_Embedding):
    """Parity reference from transformers' tokenizer, image processor and ``AltCLIPModel``."""

    def __init__(self, *, tokenizer: Any, image_processor: Any, model: Any, context_length: int) -> None:
        self.tokenizer, self.image_processor, self.model = tokenizer, image_processor, model
        self.context_length = context_length
        self.heads = MrlHeads({})

    def token_ids(self, texts: Sequence[str], languages: Sequence[str | None]) -> Int:
        """Tokenize to int64 (texts, context length); AltCLIP has no language token."""
        if not texts:
            return np.empty((0, self.context_length), np.int64)
        encoded: Mapping[str, Any] = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length
        )
        return np.asarray(encoded["input_ids"], np.int64)

    def pixels(self, image: Image.Image) -> Float:
        """Preprocess an image to normalised float32 (3, height, width)."""
        return np.asarray(self.image_processor(image, return_tensors="np")["pixel_values"][0], np.float32)

    def _text_features(self, ids: Tensor) -> Tensor:
        mask = _mask_of_trailing_pads(ids, self.tokenizer.pad_token_id)
        features: Tensor = self.model.get_text_features(ids, attention_mask=mask).pooler_output
        return features

    def _image_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixels).pooler_output
        return features


class UnmaskedReference(AltClipReference):
    """Parity reference of transformers' models that take no padding mask: SigLIP 2 and MetaCLIP 2."""

    def _text_features(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.get_text_features(ids).pooler_output
        return features


class MClipReference(AltClipReference):
    """Parity reference of M-CLIP: text from transformers' modules, images from open_clip's."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        transform: Callable[[Image.Image], Tensor],
        model: Any,
        context_length: int,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer, image_processor=None, model=model, context_length=context_length
        )
        self.transform = transform

    def pixels(self, image: Image.Image) -> Float:
        """Preprocess an image to normalised float32 (3, height, width)."""
        return np.asarray(self.transform(image), np.float32)

    def _text_features(self, ids: Tensor) -> Tensor:
        mask = _mask_of_trailing_pads(ids, self.tokenizer.pad_token_id)
        features: Tensor = self.model.text_features(ids, mask)
        return features

    def _image_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.image_features(pixels)
        return features


class NllbClipReference(AltClipReference):
    """Parity reference of NLLB-CLIP's first form: transformers' tokenizer, image processor and modules."""

    def token_ids(self, texts: Sequence[str], languages: Sequence[str | None]) -> Int:
        """Tokenize to int64 (texts, context length), with one tokenizer call per language."""
        rows = np.empty((len(texts), self.context_length), np.int64)
        for language in dict.fromkeys(languages):
            if language is None:
                raise LanguageError("NLLB needs a language for each text; pass its FLORES-200 code.")
            chosen = [i for i, own in enumerate(languages) if own == language]
            self.tokenizer.src_lang = language
            rows[chosen] = super().token_ids([texts[i] for i in chosen], [language] * len(chosen))
        return rows

    def _text_features(self, ids: Tensor) -> Tensor:
        mask = _mask_of_trailing_pads(ids, self.tokenizer.pad_token_id)
        features: Tensor = self.model.text_features(ids, mask)
        return features

    def _image_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.image_features(pixels)
        return features


def _mask_of_trailing_pads(ids: Tensor, pad_id: int) -> Tensor:
    """Return a mask of 1 up to the last non-pad token, as the tokenizer's: a "<pad>" in a text is kept."""
    return (ids != pad_id).long().flip(1).cummax(dim=1).values.flip(1)
