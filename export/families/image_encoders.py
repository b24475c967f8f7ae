"""Image encoders with plain attention that share their weights with the library's modules."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from export.families.encoders import clip_block_from_transformers, plain_attention_from_packed
from runtime.errors import CheckpointError

__all__ = ["ClipVisionEncoder", "SiglipVisionEncoder", "image_encoder_from_open_clip"]


class ClipVisionEncoder(nn.Module):
    """CLIP-style vision tower of transformers: pixels (batch, 3, height, width) → features (batch, dim).

    Source: transformers' ``modeling_altclip.py`` (``AltCLIPVisionModel`` and ``visual_projection``), and
    ``modeling_metaclip_2.py``.
    """

    positions: Tensor

    def __init__(self, model: Any, projection: nn.Linear) -> None:
        super().__init__()
        embeddings = model.embeddings
        self.patches = embeddings.patch_embedding
        self.class_token = embeddings.class_embedding
        self.register_buffer("positions", embeddings.position_embedding.weight.detach(), persistent=False)
        self.first_norm = model.pre_layrnorm  # the library's spelling
        n_heads = model.config.num_attention_heads
        self.blocks = nn.ModuleList(
            [clip_block_from_transformers(layer, n_heads) for layer in model.encoder.layers]
        )
        self.last_norm = model.post_layernorm
        self.projection = projection

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised pixels, pooling the class token."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        token = self.class_token.expand(patches.shape[0], 1, -1)
        x = self.first_norm(torch.cat([token, patches], dim=1) + self.positions)
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.projection(self.last_norm(x[:, 0])))


class SiglipVisionEncoder(nn.Module):
    """SigLIP's vision tower of transformers: pixels (batch, 3, height, width) → features (batch, width).

    Source: transformers' ``modeling_siglip.py`` (``SiglipVisionModel``).
    """

    positions: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        embeddings, head = model.embeddings, model.head
        self.patches = embeddings.patch_embedding
        self.register_buffer("positions", embeddings.position_embedding.weight.detach(), persistent=False)
        n_heads = model.config.num_attention_heads
        self.blocks = nn.ModuleList(
            [clip_block_from_transformers(layer, n_heads) for layer in model.encoder.layers]
        )
        self.last_norm = model.post_layernorm
        self.probe, self.pool_norm = head.probe, head.layernorm
        self.attention = plain_attention_from_packed(head.attention)
        self.up, self.activation, self.down = head.mlp.fc1, head.mlp.activation_fn, head.mlp.fc2

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised pixels, pooling by attention of one learned query."""
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        probe = self.probe.expand(x.shape[0], -1, -1)
        pooled = self.attention.attended(probe, self.last_norm(x))
        mixed = pooled + self.down(self.activation(self.up(self.pool_norm(pooled))))
        return cast("Tensor", mixed[:, 0])


class _PlainMultihead(nn.Module):
    """Replacement for ``nn.MultiheadAttention`` called with query = key = value."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.plain = plain_attention_from_packed(packed)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        if options.get("attn_mask") is not None:
            raise CheckpointError(
                "The image tower uses an attention mask, which is not supported. "
                "Open an issue with the checkpoint's name."
            )
        return self.plain(query), None


def image_encoder_from_open_clip(visual: nn.Module) -> nn.Module:
    """Copy an open_clip image tower with plain attention, sharing its weights.

    Raises:
        CheckpointError: the image tower is neither open_clip's ``VisionTransformer`` nor a timm model.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if not isinstance(visual, (TimmModel, VisionTransformer)):
        raise CheckpointError(
            f"Image tower {type(visual).__name__} is not supported; expected open_clip's VisionTransformer "
            "or a timm vision transformer (SigLIP). Open an issue with the checkpoint's name."
        )
    twin = _twin(visual)
    for module in twin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, _PlainMultihead(child))
    return twin


def _twin(module: nn.Module) -> nn.Module:
    """Copy a module but share its tensors."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo=cast("dict[int, Any]", shared))
