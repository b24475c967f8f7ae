"""Text and image towers: modules that map integer inputs to unit vectors.

``TextTowerModule`` takes token ids and their mask, ``ImageTowerModule`` uint8 pixels. Pooling, projection,
MRL heads, pixel normalisation and the final L2 normalisation (in FP32) are part of the modules, so that
clients cannot get them wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from runtime.errors import CheckpointError
from runtime.manifest import ImagePreprocessing, Modality, PrunedVocabulary, TextPreprocessing

__all__ = [
    "ImageTowerModule",
    "KeptTokens",
    "MrlHeads",
    "Reference",
    "TextTowerModule",
    "Towers",
    "output_name",
]

Float = NDArray[np.float32]
Int = NDArray[np.int64]


class MrlHeads(nn.Module):
    """Matryoshka (MRL) heads: one linear layer per width, applied to the embedding before normalisation.

    Source: ``MatryoshkaLayer`` in the published ``nllb_mrl.py``: ``nn.Linear(width, r)`` with bias, shared
    by both towers, normalised afterwards.
    """

    def __init__(self, heads: Mapping[int, nn.Linear]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({str(dim): heads[dim] for dim in sorted(heads)})

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths of the heads, ascending."""
        return tuple(int(dim) for dim in self.heads)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Apply the heads: (batch, width) → unit vectors (batch, r) per head, by ascending width."""
        return tuple(unit(head(features)) for head in self.heads.values())


class TextTowerModule(nn.Module):
    """Text tower: int64 ids and mask (batch, tokens) → unit float32 (batch, dim), then one per MRL head.

    A tower that does not mask padding is called without a mask, and ignores one.
    """

    def __init__(
        self,
        encoder: nn.Module,
        pool: nn.Module,
        heads: MrlHeads,
        *,
        hidden_id: int | None = None,
        end_id: int | None = None,
    ) -> None:
        """Create a tower.

        Args:
            hidden_id: Token that is masked everywhere, as open_clip does for a "<pad>" in a text.
            end_id: Token whose first place the pool gets in place of a mask, or the first place of all.
        """
        super().__init__()
        self.encoder, self.pool, self.heads = encoder, pool, heads
        self.hidden_id, self.end_id = hidden_id, end_id

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Embed padded token ids."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.hidden_id is not None:
            attention_mask = attention_mask * (input_ids != self.hidden_id).to(attention_mask.dtype)
        hidden = self.encoder(input_ids, attention_mask)
        mask = attention_mask if self.end_id is None else _first_place(input_ids, self.end_id)
        features = self.pool(hidden, mask)
        return unit(features), *self.heads(features)


class ImageTowerModule(nn.Module):
    """Image tower: uint8 (batch, 3, height, width) → unit float32 (batch, dim), then one per MRL head."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, encoder: nn.Module, heads: MrlHeads, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, heads
        deviation = torch.tensor(std, dtype=torch.float64)
        scale = 1.0 / (255.0 * deviation)
        shift = -torch.tensor(mean, dtype=torch.float64) / deviation
        self.register_buffer("scale", scale.float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Embed cropped RGB pixels."""
        features = self.encoder(pixels.to(torch.float32) * self.scale + self.shift)
        return unit(features), *self.heads(features)


class Reference(Protocol):
    """Parity reference: the family's own library, unmodified."""

    def token_ids(self, texts: Sequence[str], languages: Sequence[str | None]) -> Int:
        """Tokenize with the library, padded to the context length: int64 (texts, context)."""

    def text_vectors(self, ids: Int) -> dict[int, Float]:
        """Embed padded int64 ids (texts, any length) to unit float32 (texts, dim), keyed by dim."""

    def pixels(self, image: Image.Image) -> Float:
        """Preprocess an image with the library: normalised float32 (3, height, width)."""

    def image_vectors(self, pixels: Float) -> dict[int, Float]:
        """Embed float32 pixels (images, 3, height, width) to unit float32 (images, dim), keyed by dim."""

    def embed_texts(self, texts: Sequence[str], languages: Sequence[str | None]) -> Float:
        """Embed texts to unit float32 (texts, dim), as a user of the library would."""

    def embed_images(self, images: Sequence[Image.Image]) -> Float:
        """Embed images to unit float32 (images, dim), as a user of the library would."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptTokens:
    """Part of the vocabulary to export.

    Attributes:
        rows: Kept ids of the whole vocabulary, int64, ascending; a kept token's new id is its position.
        whole: The towers with the whole vocabulary.
        record: Description for the manifest.
    """

    rows: Int
    whole: Towers
    record: PrunedVocabulary


@dataclass(frozen=True, slots=True)
class Towers:
    """Loaded checkpoint: both towers, their preprocessing, and the library's model as reference.

    ``tokenizer_json`` is the text of a ``tokenizers`` file; ``languages`` are FLORES-200 codes.
    ``source`` records the origin of the weights. ``fingerprint`` is empty until
    ``export.fingerprint.fingerprints.with_fingerprint`` computes it.

    With ``kept``, everything but the module ``text`` is that of a pruned vocabulary: tokenizer, ids,
    languages, reference, fingerprint. The module keeps its whole token table, so that its graph is calibrated
    on the same inputs as the whole model's; the rows are removed from the finished graph.
    """

    family: str
    architecture: str
    licence: str
    dim: int
    text: TextTowerModule
    image: ImageTowerModule
    tokenizer_json: str
    text_preprocessing: TextPreprocessing
    image_preprocessing: ImagePreprocessing
    languages: tuple[str, ...]
    reference: Reference
    source: Mapping[str, Any]
    fingerprint: str = ""
    kept: KeptTokens | None = None

    def __post_init__(self) -> None:
        longest = int(cast("int", self.text.encoder.max_tokens))
        if self.text_preprocessing.context_length > longest:
            raise CheckpointError(
                f"Context length {self.text_preprocessing.context_length} is too large: this text tower has "
                f"positions for {longest} tokens. Pass a smaller one."
            )

    @property
    def mrl_dims(self) -> tuple[int, ...]:
        """Widths of the MRL heads, ascending; empty without heads."""
        return self.text.heads.dims

    @property
    def n_tokens(self) -> int:
        """Number of token ids: rows of the exported embedding table."""
        if self.kept is not None:
            return len(self.kept.rows)
        return int(self.text.encoder.get_submodule("tokens").get_parameter("weight").shape[0])

    @property
    def whole(self) -> Towers:
        """The towers with the whole vocabulary."""
        return self if self.kept is None else self.kept.whole

    @property
    def dims(self) -> tuple[int, ...]:
        """Output widths in the order of a tower's outputs: the full width, then the MRL heads'."""
        return (self.dim, *self.mrl_dims)

    def tower(self, modality: Modality) -> TextTowerModule | ImageTowerModule:
        """Return the tower of a modality."""
        return self.text if modality is Modality.TEXT else self.image


def _first_place(ids: Tensor, token: int) -> Tensor:
    """Mark the first place of a token in each row of ids with 1, or place 0 where there is none.

    Sums and comparisons only: engines differ in which of several equal values their ArgMax returns.
    """
    n_so_far = ids.eq(token).long().cumsum(dim=1)
    n_before = (n_so_far == 0).long().sum(dim=1, keepdim=True)
    place = n_before * (n_so_far[:, -1:] != 0).long()
    places = torch.ones_like(ids).cumsum(dim=1) - 1
    return (places == place).long()


def output_name(dim: int, full_dim: int) -> str:
    """Return the name of a graph output: ``vector`` for the full width, ``vector_64`` for an MRL head."""
    return "vector" if dim == full_dim else f"vector_{dim}"


def unit(features: Tensor) -> Tensor:
    """L2-normalise in FP32, since a norm computed in BF16 is off by up to 0.3%."""
    features = features.to(torch.float32)
    norm: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features / norm.clamp_min(1e-12)
