"""The same towers in PyTorch with transformers: what one would run instead, eager and compiled.

Layers, widths, heads, activation and vocabulary are the timed tower's; attention is
``scaled_dot_product_attention``, or with ``attention="eager"`` products and a softmax. Pooling, projection
and normalisation are part of the module, as in the exported towers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.gpu.towers import TimedTower
from runtime.manifest import Modality

__all__ = ["torch_tower"]

_POSITIONS = 514


class TorchImageTower(nn.Module):
    """uint8 pixels (batch, 3, side, side) → unit float32 (batch, dim)."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise pixels, encode, project and normalise."""
        dtype = next(self.vision.parameters()).dtype
        features = self.vision(pixel_values=pixels.to(dtype) * (1 / 127.5) - 1).image_embeds
        return functional.normalize(features.float(), dim=-1)


class TorchTextTower(nn.Module):
    """int64 ids and mask (batch, tokens) → unit float32 (batch, dim), by the mean over the tokens."""

    def __init__(self, encoder: nn.Module, width: int, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(width, dim, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode, pool, project and normalise."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.to(hidden.dtype)[:, :, None]
        features = self.projection((hidden * weights).sum(1) / weights.sum(1))
        return functional.normalize(features.float(), dim=-1)


def torch_tower(tower: TimedTower, *, device: str, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """Make a tower with random weights on a device; ``attention`` as transformers names it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if tower.modality is Modality.IMAGE:
                return TorchImageTower(_vision(tower, attention)).eval()
            return TorchTextTower(_text_encoder(tower, attention), tower.width, tower.dim).eval()
    finally:
        torch.set_default_dtype(before)


def _vision(tower: TimedTower, attention: str) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"image_size": tower.image_side, "patch_size": tower.patch, "projection_dim": tower.dim}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**_layers(tower, attention), **sizes))


def _text_encoder(tower: TimedTower, attention: str) -> Any:
    if tower.architecture == "m2m":
        from transformers import M2M100Config, M2M100Model

        config = M2M100Config(
            vocab_size=tower.vocabulary,
            d_model=tower.width,
            encoder_layers=tower.layers,
            encoder_attention_heads=tower.width // tower.head,
            encoder_ffn_dim=4 * tower.width,
            decoder_layers=1,
            activation_function=tower.activation,
            attn_implementation=attention,
        )
        return M2M100Model(config).get_encoder()
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(
        vocab_size=tower.vocabulary,
        max_position_embeddings=_POSITIONS,
        type_vocab_size=1,
        pad_token_id=1,
        **_layers(tower, attention),
    )
    return XLMRobertaModel(config, add_pooling_layer=False)


def _layers(tower: TimedTower, attention: str) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.width // tower.head,
        "hidden_act": tower.activation,
        "attn_implementation": attention,
    }
