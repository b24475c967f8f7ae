"""Train an image tower to map all vendors' drawings of an emoji to that emoji's prototype.

A contrastive loss against text barely learns from so few images. Classification against learned unit
prototypes works; the text towers are then trained towards the frozen prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from samples import dataset
from samples.drawings import extra_drawings
from samples.sources import NOTO, EmojiDatasource, names_from_cldr

N_FLUENT_VARIANTS = 3  # one design in three renderings, so each is weighted by a third
LABEL_SMOOTHING = 0.1
LOGIT_SCALE = 20.0


@dataclass(frozen=True, slots=True)
class TrainingDrawings:
    """Drawings of all vendors except the held-out one.

    Attributes:
        pixels: uint8 (drawings, 3, 64, 64).
        classes: int64 (drawings,), index of the emoji in Unicode order.
        n_classes: Number of emoji.
    """

    pixels: Tensor
    classes: Tensor
    n_classes: int


@dataclass(frozen=True, slots=True)
class ImageSchedule:
    """Training schedule of an image tower.

    Attributes:
        n_masked_steps: Steps with half of the patches dropped, which regularises and halves the cost.
        n_full_steps: Final steps with all patches, as at inference.
        side: Side of the square input in pixels.
        mean, std: Normalisation per channel.
    """

    n_masked_steps: int
    n_full_steps: int
    side: int
    mean: Sequence[float]
    std: Sequence[float]
    batch: int = 256
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05

    @property
    def n_steps(self) -> int:
        """Total number of steps."""
        return self.n_masked_steps + self.n_full_steps


def load_training_drawings(npm_folder: Path) -> TrainingDrawings:
    """Load the committed drawings and rasterise those of the training-only vendors."""
    emoji = EmojiDatasource(NOTO, npm_folder).emoji
    position = {one.text: index for index, one in enumerate(emoji)}
    pairs = [(one.emoji, one.image()) for one in dataset.load_training_images()]
    pairs += extra_drawings(emoji, names_from_cldr(npm_folder)["en"], npm_folder)
    pixels = tensor_from_images([image for _, image in pairs])
    return TrainingDrawings(pixels, torch.tensor([position[text] for text, _ in pairs]), len(emoji))


def tensor_from_images(images: Sequence[Image.Image]) -> Tensor:
    """Stack images to uint8 (images, 3, height, width)."""
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    )


def train_image_tower(
    tower: nn.Module,
    drop_patches: Callable[[float], None],
    drawings: TrainingDrawings,
    schedule: ImageSchedule,
    *,
    prototypes: Tensor,
    report: Callable[[int, Tensor], None],
) -> None:
    """Train ``tower`` and the prototypes together.

    Args:
        tower: Module from float32 (rows, 3, side, side) to (rows, dim).
        drop_patches: Function that sets the share of patches that the tower drops.
        drawings: Training data.
        schedule: Steps, rates and preprocessing.
        prototypes: Initial prototypes, float32 (classes, dim).
        report: Callback with the step and the current unit prototypes, called periodically and at the end.
    """
    learned = nn.Parameter(prototypes.clone())
    groups = parameter_groups(tower, learned, weight_decay=schedule.weight_decay)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    sampler = ClassBalancedSampler(drawings)
    tower.train()
    drop_patches(0.5)
    for step in range(schedule.n_steps):
        if step == schedule.n_masked_steps:
            drop_patches(0.0)
        set_learning_rate(optimiser, schedule.learning_rate * warm_cosine(step, schedule.n_steps))
        rows = sampler.draw(schedule.batch)
        pixels = augmented(drawings.pixels[rows].float() / 255, schedule)
        # On a CPU, the bfloat16 gradient of fused attention is several times slower than the plain one.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embedding = tower(pixels)
        logits = LOGIT_SCALE * unit(embedding.float()) @ unit(learned).T
        loss = functional.cross_entropy(logits, drawings.classes[rows], label_smoothing=LABEL_SMOOTHING)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99 or step + 1 == schedule.n_steps:
            print(f"image step {step + 1}/{schedule.n_steps} loss {loss.item():.3f}", flush=True)
            report(step + 1, unit(learned.detach()))
    tower.eval()


class ClassBalancedSampler:
    """Sampler of emoji, uniformly, then of one drawing; renderings of one design share one weight."""

    def __init__(self, drawings: TrainingDrawings) -> None:
        self.n_classes = drawings.n_classes
        order = drawings.classes.argsort(stable=True)
        counts = drawings.classes.bincount(minlength=self.n_classes)
        self.rows: tuple[Tensor, ...] = torch.split(order, counts.tolist())
        self.queue = torch.empty(0, dtype=torch.int64)

    def draw(self, n_rows: int) -> Tensor:
        """Draw indices of drawings, int64 (n_rows,)."""
        while len(self.queue) < n_rows:
            self.queue = torch.cat([self.queue, torch.randperm(self.n_classes)])
        picked, self.queue = self.queue[:n_rows], self.queue[n_rows:]
        return torch.stack([self._row(int(one)) for one in picked])

    def _row(self, one: int) -> Tensor:
        rows = self.rows[one]
        if len(rows) > N_FLUENT_VARIANTS and torch.rand(()) < 1 / (len(rows) - N_FLUENT_VARIANTS + 1):
            return rows[torch.randint(1, 1 + N_FLUENT_VARIANTS, ())]
        return rows[torch.randint(len(rows), ())]


def augmented(pixels: Tensor, schedule: ImageSchedule) -> Tensor:
    """Apply random colour changes and affine maps, then normalise.

    Args:
        pixels: Float32 (rows, 3, height, width) in 0–1.
        schedule: Schedule with the output side and the normalisation.

    Returns:
        Float32 (rows, 3, side, side), normalised; white outside the drawing.
    """
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (schedule.mean, schedule.std))
    shape = [len(pixels), 3, schedule.side, schedule.side]
    grid = functional.affine_grid(random_affines(len(pixels)), shape, align_corners=False)
    # grid_sample pads with zeros, so white is shifted to zero and back
    from_white = (random_colours(pixels) - 1) / std
    mode = "bicubic" if schedule.side == pixels.shape[-1] else "bilinear"
    return functional.grid_sample(from_white, grid, mode=mode, align_corners=False).add_((1 - mean) / std)


def random_affines(n_rows: int) -> Tensor:
    """Draw affine maps, float32 (rows, 2, 3): rotation, scale, shear and shift, without mirroring."""
    angle = torch.randn(n_rows) * math.radians(8)
    scale = torch.exp(torch.randn(n_rows, 2) * 0.1 + 0.05)
    shear = torch.randn(n_rows) * 0.08
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([cos * scale[:, 0], (shear - sin) * scale[:, 1]], 1)
    bottom = torch.stack([sin * scale[:, 0], cos * scale[:, 1]], 1)
    shift = torch.randn(n_rows, 2, 1) * 0.07
    return torch.cat([torch.stack([top, bottom], 1), shift], 2)


def random_colours(pixels: Tensor) -> Tensor:
    """Mix channels, change contrast and brightness, and occasionally remove colour; same shape, 0–1."""
    n_rows = len(pixels)
    mix = torch.eye(3) + torch.randn(n_rows, 3, 3) * 0.1
    mix = mix / mix.sum(2, keepdim=True)  # keeps white white
    grey = torch.rand(n_rows) < 0.08
    mix[grey] = 1 / 3
    gamma = torch.exp(torch.randn(n_rows, 1, 1, 1) * 0.25)
    mixed = torch.einsum("rij,rjhw->rihw", mix, pixels).clamp(1e-4, 1)
    return mixed.pow(gamma)


def parameter_groups(tower: nn.Module, *extra: nn.Parameter, weight_decay: float) -> list[dict[str, object]]:
    """Group parameters: weight decay for matrices, none for vectors and prototypes."""
    parameters = list(tower.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [*vectors, *extra], "weight_decay": 0.0},
    ]


def warm_cosine(step: int, n_steps: int, *, n_warm: int = 100) -> float:
    """Return the learning rate factor: linear warm-up, then cosine decay to 0.01."""
    if step < n_warm:
        return (step + 1) / n_warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(1, n_steps - n_warm)))


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Set every group's learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = value


def unit(rows: Tensor) -> Tensor:
    """L2-normalise the last axis."""
    return functional.normalize(rows, dim=-1)
