"""Convolutional teacher of the image towers.

From so few drawings a convolutional network learns faster than a vision transformer and recognises more
drawings of a vendor that it never saw. The transformers that the samples need learn from it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Residual block of two 3 × 3 convolutions; halves the sides if ``stride`` is 2."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(n_out)
        self.second = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(n_out)
        nn.init.zeros_(self.second_norm.weight)  # a block starts as its shortcut
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(n_in, n_out, 1, bias=False),
                nn.BatchNorm2d(n_out),
            )

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (rows, n_in, side, side) to (rows, n_out, side / stride, side / stride)."""
        change = self.second_norm(self.second(functional.relu(self.first_norm(self.first(pixels)))))
        return functional.relu(self.shortcut(pixels) + change)


def teacher(dim: int, width: int) -> nn.Module:
    """Build a residual network from float (rows, 3, 64, 64) to (rows, dim)."""
    stages = [nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU()]
    n_in = width // 2
    for n_out in (width, 2 * width, 4 * width):
        stages += [Block(n_in, n_out, 2), Block(n_out, n_out, 1)]
        n_in = n_out
    stages += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, dim)]
    return nn.Sequential(*stages).to(memory_format=torch.channels_last)
