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

from runtime.errors import CheckpointError

__all__ = [
    "EncoderBlock",
    "PlainAttention",
    "PositionedEncoder",
    "TextEncoder",
    "attention_bias",
    "clip_block_from_transformers",
    "clip_encoder_from_transformers",
    "encoder_from_open_clip",
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
        """Compute self-attention; ``bias`` (batch or 1, 1, tokens or 1, tokens) is added to the scores."""
        return self.attended(x, x, bias)

    def attended(self, asking: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute attention of ``asking`` (batch or 1, queries, width) over ``x`` (batch, tokens, width)."""
        query = self._heads(self.query(asking)) * self.scale
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

    @property
    def max_tokens(self) -> int:
        """Longest text that there are positions for, in tokens."""
        return int(self.positions.shape[0]) - self.pad_id - 1

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


class PositionedEncoder(nn.Module):
    """Text encoder of CLIP's kind, token ids → hidden states: learned positions from 0, layer norm first.

    It has no padding mask: a causal one pools a token before the padding, and any other reads the padding.
    """

    positions: Tensor
    causal_bias: Tensor | None

    def __init__(
        self, tokens: nn.Embedding, positions: Tensor, blocks: list[EncoderBlock], *, causal: bool
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.register_buffer("positions", positions.detach(), persistent=False)
        n_positions = positions.shape[0]
        ahead = torch.ones(n_positions, n_positions).triu(1) * MASKED
        self.register_buffer("causal_bias", ahead[None, None] if causal else None, persistent=False)
        self.blocks = nn.ModuleList(blocks)

    @property
    def max_tokens(self) -> int:
        """Longest text that there are positions for, in tokens."""
        return int(self.positions.shape[0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode ids, int64 (batch, tokens), to float (batch, tokens, width), before the last norm."""
        n_tokens = input_ids.shape[1]
        x = functional.embedding(input_ids, self.tokens.weight) + self.positions[:n_tokens]
        bias = None if self.causal_bias is None else self.causal_bias[:, :, :n_tokens, :n_tokens]
        for block in self.blocks:
            x = block(x, bias)
        return x


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


def clip_encoder_from_transformers(model: Any, *, causal: bool) -> PositionedEncoder:
    """Build the encoder of a ``SiglipTextModel`` or ``MetaClip2TextModel``, without its last norm.

    Source: transformers' ``modeling_siglip.py`` and ``modeling_metaclip_2.py``.
    """
    n_heads = model.config.num_attention_heads
    return PositionedEncoder(
        model.embeddings.token_embedding,
        model.embeddings.position_embedding.weight,
        [clip_block_from_transformers(layer, n_heads) for layer in model.encoder.layers],
        causal=causal,
    )


def clip_block_from_transformers(layer: Any, n_heads: int) -> EncoderBlock:
    """Build a layer of CLIP's kind, shared by the text and image towers of transformers."""
    inner = layer.self_attn
    return EncoderBlock(
        PlainAttention(inner.q_proj, inner.k_proj, inner.v_proj, inner.out_proj, n_heads=n_heads),
        layer.layer_norm1,
        layer.mlp.fc1,
        layer.mlp.activation_fn,
        layer.mlp.fc2,
        layer.layer_norm2,
        norm_first=True,
    )


def encoder_from_open_clip(text: Any) -> PositionedEncoder:
    """Build the encoder of open_clip's ``TextTransformer``, without its last norm.

    Raises:
        CheckpointError: the tower has a class token, a padding mask, or blocks that are not CLIP's.

    Source: open_clip's ``transformer.py``.
    """
    from open_clip.transformer import ResidualAttentionBlock

    blocks = list(text.transformer.resblocks)
    plain = all(
        type(block) is ResidualAttentionBlock
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.ls_2, nn.Identity)
        for block in blocks
    )
    if not plain or text.cls_emb is not None or text.use_pad_mask:
        raise CheckpointError(
            "The text tower of open_clip_config.json has a class token, a padding mask, layer scale or a "
            "custom block, which are not supported. Open an issue with the checkpoint's name."
        )
    return PositionedEncoder(
        text.token_embedding,
        text.positional_embedding,
        [_open_clip_block(block) for block in blocks],
        causal=text.attn_mask is not None,
    )


def _open_clip_block(block: Any) -> EncoderBlock:
    return EncoderBlock(
        plain_attention_from_packed(block.attn),
        block.ln_1,
        block.mlp.c_fc,
        block.mlp.gelu,
        block.mlp.c_proj,
        block.ln_2,
        norm_first=True,
    )


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
