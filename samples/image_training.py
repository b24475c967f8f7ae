"""The loop that trains an image tower to map all vendors' drawings of an emoji to that emoji's prototype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from samples import towers
from samples.augmentation import augmented
from samples.images import (
    LABEL_SMOOTHING,
    LOGIT_SCALE,
    ClassBalancedSampler,
    ImageSettings,
    TrainingDrawings,
    recalls,
    set_learning_rate,
    unit,
    warm_cosine,
)
from samples.training import ResumableRun, Stateful

RESEMBLANCE = 10.0  # weight of the cosine to the teacher relative to the cross-entropy
AVERAGED_STEPS = 150  # length of the moving average of the weights
MEASURE_EVERY = 200


@dataclass(frozen=True, slots=True)
class ImageSchedule:
    """Training schedule of an image tower.

    Attributes:
        n_steps: Number of steps.
        batch: Drawings of a step, each of another emoji.
        learning_rate: Highest learning rate.
        share_masked: Share of the steps, the first, that drop half of each row's patches: that regularises
            and halves the cost.
        side: Height and width of the drawings that the tower sees.
    """

    n_steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.05
    n_warm: int = 100
    share_masked: float = 0.0
    side: int = towers.IMAGE_SIDE


@dataclass(frozen=True, slots=True)
class Data:
    """Drawings to learn from, those that are held out if any, and the settings."""

    drawings: TrainingDrawings
    held_out: TrainingDrawings | None
    settings: ImageSettings

    def augmented(self, rows: Tensor, side: int = towers.IMAGE_SIDE) -> Tensor:
        """Change drawings at random; float32 (rows, 3, side, side) in CLIP's normalisation."""
        pixels = self.drawings.pixels[rows].float() / 255
        return augmented(pixels, *clip_statistics(), strength=self.settings.strength, side=side)

    def sampler(self) -> ClassBalancedSampler:
        """Return a sampler of the drawings to learn from."""
        return ClassBalancedSampler(self.drawings, self.settings.share_restyled)

    @torch.no_grad()
    def recalls(
        self, embed: Callable[[Tensor], Tensor], prototypes: Tensor, side: int = towers.IMAGE_SIDE
    ) -> dict[str, float]:
        """Measure a tower on the held-out drawings; empty without any."""
        if self.held_out is None:
            return {}
        mean, std = clip_statistics()
        pixels = resized(self.held_out.pixels.float() / 255, side)
        parts = [embed((part - mean) / std) for part in torch.split(pixels, 256)]
        return recalls(unit(torch.cat(parts)), self.held_out.classes, unit(prototypes))


class Student:
    """What the loop trains: a tower, how it embeds pixels in CLIP's normalisation, and its prototypes.

    A subclass changes how the tower computes.
    """

    def __init__(self, tower: nn.Module, prototypes: Prototypes) -> None:
        self.tower, self.prototypes = tower, prototypes

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Group the parameters: ``speed`` is a factor on the learning rate."""
        matrices = [parameter for parameter in self.tower.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.tower.parameters() if parameter.ndim <= 1]
        learned = [rows for rows in self.prototypes.parameters() if rows.requires_grad]
        return [
            {"params": matrices, "weight_decay": weight_decay, "speed": 1.0},
            {"params": [*vectors, *learned], "weight_decay": 0.0, "speed": 1.0},
        ]

    def embed(self, pixels: Tensor, *, drop: float) -> Tensor:
        """Embed a batch for training, float32 (rows, dim)."""
        raise NotImplementedError

    def embed_with(self, tower: nn.Module, pixels: Tensor) -> Tensor:
        """Embed a batch with an average of the tower's weights, float32 (rows, dim)."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        torch.autograd.backward(loss)


class Prototypes(nn.Module):
    """Rows that stand for the emoji: learned, or given.

    Attributes:
        rows: Float32 (emoji, dim), not normalised.
    """

    rows: nn.Parameter

    def __init__(self, rows: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone(), requires_grad=learned)


class Average:
    """Moving average of the weights of a tower and its prototypes; it recognises more than the last ones."""

    def __init__(self, tower: nn.Module, prototypes: Prototypes) -> None:
        self.modules = (tower, prototypes)
        self.tower, self.prototypes = self.copies = copy.deepcopy(self.modules)
        self.tower.eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the modules' present weights in; early ones are soon forgotten."""
        share = max(1 / AVERAGED_STEPS, 9 / (10 + step))
        for module, average in zip(self.modules, self.copies, strict=True):
            for ours, theirs in zip(average.parameters(), module.parameters(), strict=True):
                ours.lerp_(theirs, share)
            for kept, present in zip(average.buffers(), module.buffers(), strict=True):
                kept.copy_(present)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {str(index): one.state_dict() for index, one in enumerate(self.copies)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages."""
        for index, one in enumerate(self.copies):
            one.load_state_dict(state_dict[str(index)])


def train_student(
    student: Student,
    data: Data,
    schedule: ImageSchedule,
    path: Path,
    *,
    n_steps: int,
    teach: Callable[[Tensor], Tensor] | None = None,
) -> tuple[nn.Module, Tensor]:
    """Train a tower, or continue where it was stopped.

    Args:
        student: Tower and prototypes.
        data: Drawings.
        schedule: Rates and batch.
        path: Path of the run's state and curve, see ``ResumableRun``.
        n_steps: Number of steps.
        teach: Function from pixels to the unit embeddings that the tower is to resemble.

    Returns:
        The tower with averaged weights, in evaluation mode, and unit float32 prototypes (emoji, dim).
    """
    tower, prototypes = student.tower, student.prototypes
    optimiser = torch.optim.AdamW(student.groups(schedule.weight_decay), betas=(0.9, 0.98), fused=True)
    sampler, average = data.sampler(), Average(tower, prototypes)
    parts: dict[str, Stateful] = {
        "tower": tower,
        "prototypes": prototypes,
        "optimiser": optimiser,
        "sampler": sampler,
        "average": average,
    }
    settings = {**asdict(schedule), **asdict(data.settings), "n_drawings": len(data.drawings.classes)}
    run = ResumableRun(path, parts, settings, n_steps)
    for step in run.steps():
        factor = warm_cosine(step, n_steps, n_warm=schedule.n_warm)
        set_learning_rate(optimiser, schedule.learning_rate * factor)
        rows = sampler.draw(schedule.batch)
        pixels = data.augmented(rows, schedule.side)
        found = unit(student.embed(pixels, drop=0.5 if step < schedule.share_masked * n_steps else 0.0))
        loss = classification(found, prototypes.rows, data.drawings.classes[rows], data.settings.both_ways)
        if teach:
            loss = loss + RESEMBLANCE * (1 - (found * teach(pixels)).sum(1).mean())
        optimiser.zero_grad(set_to_none=True)
        student.backward(loss)
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        average.update(step)
        if step % MEASURE_EVERY == MEASURE_EVERY - 1 or step + 1 == n_steps:
            measured = data.recalls(
                lambda seen: student.embed_with(average.tower, seen), average.prototypes.rows, schedule.side
            )
            run.record(loss=round(loss.item(), 4), **measured)
    return average.tower, unit(average.prototypes.rows.detach())


def classification(found: Tensor, prototypes: Tensor, classes: Tensor, both_ways: float) -> Tensor:
    """Compute the cross-entropy of embeddings against all prototypes, and of prototypes against the batch.

    Args:
        found: Unit float32 (rows, dim).
        prototypes: Float32 (emoji, dim).
        classes: int64 (rows,), each emoji once.
        both_ways: Weight of the second part.

    Returns:
        Scalar.
    """
    logits = LOGIT_SCALE * found @ unit(prototypes).T
    loss = functional.cross_entropy(logits, classes, label_smoothing=LABEL_SMOOTHING)
    own = torch.arange(len(classes))
    back = functional.cross_entropy(logits[:, classes].T, own, label_smoothing=LABEL_SMOOTHING)
    return loss + both_ways * back


def resized(pixels: Tensor, side: int) -> Tensor:
    """Resize float (rows, 3, height, width) to (rows, 3, side, side), bilinearly."""
    if pixels.shape[-1] == side:
        return pixels
    return functional.interpolate(pixels, size=side, mode="bilinear", align_corners=False)


def clip_statistics() -> tuple[Tensor, Tensor]:
    """Return CLIP's mean and standard deviation, float32 (1, 3, 1, 1)."""
    mean, std = (torch.tensor(towers.CLIP_PREPROCESSING[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return mean, std
