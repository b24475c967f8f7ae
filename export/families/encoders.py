"""Plain transformer encoders, whose exported graphs every engine can optimise.

A checkpoint's own library computes attention in fused kernels, with masks built by code that does not trace.
Here the same weights (shared tensors, not copies) are used by simple modules that give the same numbers:
separate query, key and value products, one additive mask, softmax. Parity with the library is measured at
every export.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "EncoderBlock",
    "PlainAttention",
    "TextEncoder",
    "attention_bias",
    "m2m_encoder_from_transformers",
    "plain_attention_from_packed",
    "roberta_encoder_from_transformers",
]

MASKED = -30_000.0
"""Value added to the score of a masked key: exp() of it is exactly 0 in FP32, and it is finite in FP16."""


class PlainAttention(nn.Module):
    """Multi-head self-attention: (batch, tokens, width) → (batch, tokens, width)."""

    def __init__(
        self, query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Module, *, n_heads: int
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = query, key, value, out
        self.n_heads = n_heads
        self.head_width = query.out_features // n_heads
        self.scale = self.head_width**-0.5

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute self-attention; ``bias`` (batch, 1, 1, tokens) is added to the scores."""
        query = self._heads(self.query(x)) * self.scale
        scores = query @ self._heads(self.key(x)).transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        mixed = scores.softmax(dim=-1) @ self._heads(self.value(x))
        return cast("Tensor", self.out(mixed.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.n_heads, self.head_width).transpose(1, 2)


class EncoderBlock(nn.Module):
    """Encoder layer, with layer norm before (M2M100) or after (RoBERTa) each sub-layer."""

    def __init__(
        self,
        attention: PlainAttention,
        attention_norm: nn.Module,
        up: nn.Module,
        activation: nn.Module,
        down: nn.Module,
        mlp_norm: nn.Module,
        *,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, attention_norm
        self.up, self.activation, self.down, self.mlp_norm = up, activation, down, mlp_norm
        self.norm_first = norm_first

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the layer: (batch, tokens, width) → the same shape."""
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), bias)
            return x + self._mlp(self.mlp_norm(x))
        x = cast("Tensor", self.attention_norm(x + self.attention(x, bias)))
        return cast("Tensor", self.mlp_norm(x + self._mlp(x)))

    def _mlp(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.down(self.activation(self.up(x))))


class TextEncoder(nn.Module):
    """Text encoder, token ids → hidden states, with fairseq positions.

    Padding tokens have position ``pad_id``; the others count up from ``pad_id + 1``.
    """

    positions: Tensor

    def __init__(
        self,
        tokens: nn.Embedding,
        positions: Tensor,
        blocks: list[EncoderBlock],
        *,
        pad_id: int,
        token_scale: float = 1.0,
        first_norm: nn.Module | None = None,
        last_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.register_buffer("positions", positions.detach(), persistent=False)
        self.blocks = nn.ModuleList(blocks)
        self.pad_id, self.token_scale = pad_id, token_scale
        self.first_norm = first_norm or nn.Identity()
        self.last_norm = last_norm or nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode ids and mask, both int64 (batch, tokens), to float (batch, tokens, width)."""
        present = (input_ids != self.pad_id).long()
        places = present.cumsum(dim=1) * present + self.pad_id
        tokens = functional.embedding(input_ids, self.tokens.weight)
        x = tokens * self.token_scale + functional.embedding(places, self.positions)
        x = self.first_norm(x)
        bias = attention_bias(attention_mask)
        for block in self.blocks:
            x = block(x, bias)
        return cast("Tensor", self.last_norm(x))


def attention_bias(attention_mask: Tensor) -> Tensor:
    """Turn an int64 mask (batch, tokens), 1 for tokens, into a float bias (batch, 1, 1, tokens).

    The bias is 0 for tokens and ``MASKED`` for padding.
    """
    return (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * MASKED


def plain_attention_from_packed(packed: nn.MultiheadAttention) -> PlainAttention:
    """Split torch's packed projection into three linear layers that share its storage."""
    weights = packed.in_proj_weight.chunk(3)
    biases = packed.in_proj_bias.chunk(3)
    query, key, value = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
    return PlainAttention(query, key, value, packed.out_proj, n_heads=packed.num_heads)


def roberta_encoder_from_transformers(model: Any) -> TextEncoder:
    """Build the encoder of an ``XLMRobertaModel`` or ``AltRobertaModel``, without its pooler.

    Source: transformers' ``modeling_xlm_roberta.py``; the single token type is folded into the positions.
    """
    embeddings = model.embeddings
    layers = getattr(model.encoder, "layers", None) or model.encoder.layer
    n_heads = model.config.num_attention_heads
    return TextEncoder(
        embeddings.word_embeddings,
        embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0],
        [_roberta_block(layer, n_heads) for layer in layers],
        pad_id=embeddings.padding_idx,
        first_norm=embeddings.LayerNorm,
    )


def _roberta_block(layer: Any, n_heads: int) -> EncoderBlock:
    inner, attended = layer.attention.self, layer.attention.output
    return EncoderBlock(
        PlainAttention(inner.query, inner.key, inner.value, attended.dense, n_heads=n_heads),
        attended.LayerNorm,
        layer.intermediate.dense,
        layer.intermediate.intermediate_act_fn,
        layer.output.dense,
        layer.output.LayerNorm,
        norm_first=False,
    )


def m2m_encoder_from_transformers(encoder: Any) -> TextEncoder:
    """Build the encoder of an ``M2M100Model`` (NLLB): sinusoidal positions, layer norm before each sub-layer.

    Source: transformers' ``modeling_m2m_100.py``.
    """
    n_heads = encoder.config.encoder_attention_heads
    return TextEncoder(
        encoder.embed_tokens,
        encoder.embed_positions.weights,
        [_m2m_block(layer, n_heads) for layer in encoder.layers],
        pad_id=encoder.padding_idx,
        token_scale=float(encoder.embed_tokens.embed_scale),
        last_norm=encoder.layer_norm,
    )


def _m2m_block(layer: Any, n_heads: int) -> EncoderBlock:
    inner = layer.self_attn
    return EncoderBlock(
        PlainAttention(inner.q_proj, inner.k_proj, inner.v_proj, inner.out_proj, n_heads=n_heads),
        layer.self_attn_layer_norm,
        layer.fc1,
        layer.activation_fn,
        layer.fc2,
        layer.final_layer_norm,
        norm_first=True,
    )


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
