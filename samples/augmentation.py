"""Random changes of drawings that keep what they show: colours, blur, place, size, turn and bends."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

SHARE_BLURRED = 0.15
SHARE_GREY = 0.08
SHARE_ANY_HUE = 0.1


def augmented(
    pixels: Tensor, mean: Tensor, std: Tensor, *, strength: float = 1.0, side: int | None = None
) -> Tensor:
    """Change drawings at random, then normalise.

    Args:
        pixels: Float32 (rows, 3, height, width) in 0–1.
        mean: Float32 (1, 3, 1, 1), mean of each channel, for the normalisation.
        std: Float32 (1, 3, 1, 1), standard deviation of each channel.
        strength: Factor on the changes of hue, blur and bends; 0 leaves affine maps, contrast and mixing.
        side: Height and width of the result; the drawings' own by default.

    Returns:
        Float32 (rows, 3, side, side), normalised; white outside the drawing.
    """
    coloured = turned_hues(random_colours(pixels), strength)
    blurred = torch.rand(len(pixels)) < strength * SHARE_BLURRED
    coloured[blurred] = functional.avg_pool2d(coloured[blurred], 3, 1, 1, count_include_pad=False)
    side = side or pixels.shape[-1]
    shape = [len(pixels), 3, side, side]
    grid = functional.affine_grid(random_affines(len(pixels)), shape, align_corners=False)
    grid = grid + strength * random_bends(len(pixels), side)
    # grid_sample pads with zeros, so white is shifted to zero and back
    moved = functional.grid_sample((coloured - 1) / std, grid, mode="bilinear", align_corners=False)
    return moved.add_((1 - mean) / std)


def random_affines(n_rows: int) -> Tensor:
    """Draw affine maps, float32 (rows, 2, 3): rotation, scale, shear and shift, without mirroring."""
    angle = torch.randn(n_rows) * math.radians(8)
    scale = torch.exp(torch.randn(n_rows, 2) * 0.1 + torch.randn(n_rows, 1) * 0.1 + 0.05)
    shear = torch.randn(n_rows) * 0.08
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([cos * scale[:, 0], (shear - sin) * scale[:, 1]], 1)
    bottom = torch.stack([sin * scale[:, 0], cos * scale[:, 1]], 1)
    shift = torch.randn(n_rows, 2, 1) * 0.07
    return torch.cat([torch.stack([top, bottom], 1), shift], 2)


def random_bends(n_rows: int, side: int) -> Tensor:
    """Draw smooth displacements, float32 (rows, side, side, 2), in units of half a side."""
    coarse = torch.randn(n_rows, 2, 4, 4) * 0.05
    fine = functional.interpolate(coarse, size=side, mode="bicubic", align_corners=True)
    return fine.permute(0, 2, 3, 1)


def random_colours(pixels: Tensor) -> Tensor:
    """Mix channels, change contrast and brightness, and occasionally remove colour; same shape, 0–1."""
    n_rows = len(pixels)
    mix = torch.eye(3) + torch.randn(n_rows, 3, 3) * 0.1
    mix = mix / mix.sum(2, keepdim=True)  # keeps white white
    mix[torch.rand(n_rows) < SHARE_GREY] = 1 / 3
    gamma = torch.exp(torch.randn(n_rows, 1, 1, 1) * 0.25)
    mixed = torch.einsum("rij,rjhw->rihw", mix, pixels).clamp(1e-4, 1)
    return mixed.pow(gamma)


def turned_hues(pixels: Tensor, strength: float) -> Tensor:
    """Rotate colours about the grey axis, mostly a little, sometimes by any angle; same shape, 0–1."""
    n_rows = len(pixels)
    any_hue, little = torch.rand(n_rows) * 2 * math.pi, torch.randn(n_rows) * 0.25 * strength
    angle = torch.where(torch.rand(n_rows) < strength * SHARE_ANY_HUE, any_hue, little)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turn = cos * torch.eye(3) + (1 - cos) / 3 + sin * across  # Rodrigues' formula for the axis (1, 1, 1)
    return torch.einsum("rij,rjhw->rihw", turn, pixels).clamp(0, 1)
