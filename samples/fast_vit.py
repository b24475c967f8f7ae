"""open_clip's vision transformer in bfloat16, for training on CPUs.

PyTorch's autocast converts between float32 and bfloat16 at every layer norm, and its attention in plain
operations guards against wholly masked rows. Without either, a step takes two thirds of the CPU time.
"""

from __future__ import annotations

import copy

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional


class HalfPrecision:
    """A tower's copy in bfloat16, which computes embeddings and gradients for the float32 tower.

    Each step: ``refresh``, ``embed``, backward, ``return_gradients``, and the optimiser's step on the tower.
    """

    def __init__(self, tower: VisionTransformer) -> None:
        self.tower = tower
        self.copy = copy.deepcopy(tower).bfloat16()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the tower's weights."""
        for ours, theirs in zip(self.copy.parameters(), self.tower.parameters(), strict=True):
            ours.copy_(theirs)
            ours.grad = None

    def embed(self, pixels: Tensor, *, drop: float = 0.0) -> Tensor:
        """Embed normalised pixels to float32 (rows, dim), ignoring a random share of the patches."""
        return embedded(self.copy, pixels.bfloat16(), drop=drop).float()

    def return_gradients(self) -> None:
        """Give the tower the gradients."""
        for ours, theirs in zip(self.copy.parameters(), self.tower.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.float()


def embedded(tower: VisionTransformer, pixels: Tensor, *, drop: float = 0.0) -> Tensor:
    """Compute what ``tower(pixels)`` does, in the dtype of its weights.

    Args:
        tower: Tower with class-token pooling and fused query, key and value.
        pixels: Normalised (rows, 3, side, side) in the tower's dtype.
        drop: Share of the patches that each row ignores, drawn at random.

    Returns:
        Embeddings (rows, dim).
    """
    hidden = tower.conv1(pixels).flatten(2).transpose(1, 2) + tower.positional_embedding[1:]
    if drop:
        n_kept = round(hidden.shape[1] * (1 - drop))
        kept = torch.rand(hidden.shape[:2]).argsort(1)[:, :n_kept, None]
        hidden = hidden.gather(1, kept.expand(-1, -1, hidden.shape[-1]))
    first = (tower.class_embedding + tower.positional_embedding[0]).expand(len(hidden), 1, -1)
    hidden = tower.ln_pre(torch.cat([first, hidden], 1))
    for block in tower.transformer.resblocks:
        hidden = hidden + _attention(block.attn, block.ln_1(hidden))
        hidden = hidden + block.mlp.c_proj(functional.gelu(block.mlp.c_fc(block.ln_2(hidden))))
    return torch.as_tensor(tower.ln_post(hidden[:, 0]) @ tower.proj)


def _attention(module: torch.nn.MultiheadAttention, hidden: Tensor) -> Tensor:
    n_rows, length, width = hidden.shape
    heads = module.num_heads
    fused = functional.linear(hidden, module.in_proj_weight, module.in_proj_bias)
    split = fused.view(n_rows, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    query, key, value = split.reshape(3, n_rows * heads, length, width // heads).unbind(0)
    none = torch.zeros(1, 1, 1, dtype=query.dtype)
    scores = torch.baddbmm(none, query, key.transpose(1, 2), beta=0, alpha=(width // heads) ** -0.5)
    mixed = torch.bmm(scores.softmax(-1), value).view(n_rows, heads, length, width // heads)
    return torch.as_tensor(module.out_proj(mixed.transpose(1, 2).reshape(n_rows, length, width)))
