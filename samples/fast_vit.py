"""The vision transformers of open_clip and timm for training on CPUs, in bfloat16 where that is fast.

PyTorch's autocast converts between float32 and bfloat16 at every layer norm, and its attention in plain
operations guards against wholly masked rows. Without either, a step takes two thirds of the CPU time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from samples.training import computing_dtype


class ComputingCopy:
    """A tower's copy in ``computing_dtype``, which computes embeddings and gradients for the float32 tower.

    Each step: ``refresh``, ``embed``, backward, ``return_gradients``, and the optimiser's step on the tower.

    Args:
        tower: Tower to train.
        embedded: How to compute its embeddings: ``clip_embedded`` or ``siglip_embedded``.
    """

    def __init__(self, tower: nn.Module, embedded: Callable[..., Tensor]) -> None:
        self.tower, self.embedded = tower, embedded
        self.copy = copy.deepcopy(tower).to(computing_dtype())

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the tower's weights."""
        for ours, theirs in zip(self.copy.parameters(), self.tower.parameters(), strict=True):
            ours.copy_(theirs)
            ours.grad = None

    def embed(self, pixels: Tensor, *, drop: float = 0.0) -> Tensor:
        """Embed normalised pixels to float32 (rows, dim), ignoring a random share of the patches."""
        return self.embedded(self.copy, pixels.to(computing_dtype()), drop=drop).float()

    def return_gradients(self) -> None:
        """Give the tower the gradients."""
        for ours, theirs in zip(self.copy.parameters(), self.tower.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.float()


def clip_embedded(tower: VisionTransformer, pixels: Tensor, *, drop: float = 0.0) -> Tensor:
    """Compute what ``tower(pixels)`` does, in the dtype of its weights.

    Args:
        tower: Tower with class-token pooling and fused query, key and value.
        pixels: Normalised (rows, 3, side, side) in the tower's dtype.
        drop: Share of the patches that each row ignores, drawn at random.

    Returns:
        Embeddings (rows, dim).
    """
    hidden = tower.conv1(pixels).flatten(2).transpose(1, 2) + tower.positional_embedding[1:]
    hidden = _some_of(hidden, drop)
    first = (tower.class_embedding + tower.positional_embedding[0]).expand(len(hidden), 1, -1)
    hidden = tower.ln_pre(torch.cat([first, hidden], 1))
    for block in tower.transformer.resblocks:
        attention, seen = block.attn, block.ln_1(hidden)
        fused = functional.linear(seen, attention.in_proj_weight, attention.in_proj_bias)
        hidden = hidden + attention.out_proj(_attended(fused, attention.num_heads))
        hidden = hidden + block.mlp.c_proj(functional.gelu(block.mlp.c_fc(block.ln_2(hidden))))
    return torch.as_tensor(tower.ln_post(hidden[:, 0]) @ tower.proj)


def siglip_embedded(tower: Any, pixels: Tensor, *, drop: float = 0.0) -> Tensor:
    """Compute what timm's SigLIP tower does, in the dtype of its weights; as ``clip_embedded``."""
    hidden = _some_of(tower.patch_embed(pixels) + tower.pos_embed, drop)
    for block in tower.blocks:
        fused = block.attn.qkv(block.norm1(hidden))
        hidden = hidden + block.attn.proj(_attended(fused, block.attn.num_heads))
        hidden = hidden + block.mlp(block.norm2(hidden))
    # On a CPU, the bfloat16 gradient of fused attention is several times slower than the plain one.
    with sdpa_kernel(SDPBackend.MATH):
        return torch.as_tensor(tower.attn_pool(tower.norm(hidden)))


def _some_of(hidden: Tensor, drop: float) -> Tensor:
    """Drop a share of each row's patches, drawn at random."""
    if not drop:
        return hidden
    n_kept = round(hidden.shape[1] * (1 - drop))
    kept = torch.rand(hidden.shape[:2]).argsort(1)[:, :n_kept, None]
    return hidden.gather(1, kept.expand(-1, -1, hidden.shape[-1]))


def _attended(fused: Tensor, heads: int) -> Tensor:
    """Let positions attend to each other, by their query, key and value.

    Args:
        fused: The three side by side, (rows, length, 3 × width).
        heads: Number of heads.

    Returns:
        (rows, length, width).
    """
    n_rows, length, width = fused.shape[0], fused.shape[1], fused.shape[2] // 3
    split = fused.view(n_rows, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    query, key, value = split.reshape(3, n_rows * heads, length, width // heads).unbind(0)
    none = torch.zeros(1, 1, 1, dtype=query.dtype)
    scores = torch.baddbmm(none, query, key.transpose(1, 2), beta=0, alpha=(width // heads) ** -0.5)
    mixed = torch.bmm(scores.softmax(-1), value).view(n_rows, heads, length, width // heads)
    return mixed.transpose(1, 2).reshape(n_rows, length, width)
