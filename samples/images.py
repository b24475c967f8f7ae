"""Drawings that the image towers learn from: several vendors', each in several styles.

A contrastive loss against text barely learns from so few images. Classification against learned unit
prototypes works; the text towers are then trained towards the frozen prototypes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from samples import dataset, drawings, restyling
from samples.drawings import DESIGNS, ICON_NAMES, VendorDrawing, extra_drawings
from samples.sources import NOTO, EmojiDatasource, names_from_cldr
from samples.training import save

LABEL_SMOOTHING = 0.1
LOGIT_SCALE = 20.0
SHARES = {
    "fluent-flat": 0.6,
    "fluent-colour": 0.4,
    "fluent-3d": 0.4,
    "fluent-lines": 0.15,
    "emojione-lines": 0.15,
    "noto-lines": 0.25,
    "flagpack": 0.5,
    "circle-flags": 0.3,
}
"""How often a set is drawn from, relative to others: less if its design has several, or without colours."""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """Settings of the image stages; ``samples.trials`` compares them with others on a held-out vendor.

    Attributes:
        share_restyled: Share of drawings in another style than their vendor's, where there are any.
        strength: Strength of the random changes of pixels, see ``augmented``.
        both_ways: Weight of the loss that has a prototype find its drawing among the batch's, beside the loss
            that has a drawing find its prototype. A query does the former.
        without: Designs that are left out.
    """

    share_restyled: float = 0.2
    strength: float = 1.0
    both_ways: float = 0.5
    without: tuple[str, ...] = ()


SEED_OF_STYLES = 20240


@dataclass(frozen=True, slots=True)
class TrainingDrawings:
    """Drawings of all vendors except the gallery's.

    Attributes:
        pixels: uint8 (drawings, 3, 64, 64).
        classes: int64 (drawings,), index of the emoji in Unicode order.
        vendors: Set that each drawing is from, a key of ``DESIGNS``.
        restyled: bool (drawings,), False for a drawing as its vendor made it.
        n_classes: Number of emoji.
    """

    pixels: Tensor
    classes: Tensor
    vendors: tuple[str, ...]
    restyled: Tensor
    n_classes: int

    def weights(self, share_restyled: float) -> Tensor:
        """Return how often to draw each drawing relative to its emoji's others, float32 (drawings,)."""
        names = sorted(set(self.vendors))
        vendor = torch.tensor([names.index(name) for name in self.vendors])
        originals = 2 * (
            self.classes * len(names) + vendor
        )  # every emoji's drawings by one vendor, and restyled
        kind, length = originals + self.restyled, 2 * self.n_classes * len(names)
        n_alike = kind.bincount(minlength=length)
        share = torch.where(self.restyled, share_restyled, 1 - share_restyled)
        has_both = (n_alike[originals] > 0) & (n_alike[originals + 1] > 0)
        shares = torch.tensor([SHARES.get(name, 1.0) for name in names])[vendor]
        return shares * torch.where(has_both, share, 1.0) / n_alike[kind]

    def split(self, design: str, *, every: int = 1) -> tuple[TrainingDrawings, TrainingDrawings]:
        """Hold out one design: the drawings of all others, and those of its first set as they were drawn.

        Args:
            design: Value of ``DESIGNS``.
            every: Hold out the drawings of every so many emoji only.

        Raises:
            ValueError: no drawing is of that design.
        """
        first = next((name for name in DESIGNS if DESIGNS[name] == design), None)
        of_design = torch.tensor([DESIGNS[name] == design for name in self.vendors])
        held_out = of_design & (self.classes % every == 0)
        shown = torch.tensor([name == first for name in self.vendors]) & ~self.restyled
        if not shown.any():
            raise ValueError(f"No drawings of {design!r}; there are {sorted(set(DESIGNS.values()))}")
        return self._rows(~held_out), self._rows(shown & held_out)

    def without(self, designs: Sequence[str]) -> TrainingDrawings:
        """Leave out whole designs."""
        if not designs:
            return self
        return self._rows(torch.tensor([DESIGNS[name] not in designs for name in self.vendors]))

    def _rows(self, wanted: Tensor) -> TrainingDrawings:
        rows = wanted.nonzero().flatten()
        vendors = tuple(self.vendors[row] for row in rows.tolist())
        return TrainingDrawings(
            self.pixels[rows], self.classes[rows], vendors, self.restyled[rows], self.n_classes
        )


def load_training_drawings(npm_folder: Path) -> TrainingDrawings:
    """Load the drawings that ``rasterise`` wrote, or write them first."""
    path = npm_folder / f"drawings-{_digest_of_sources()}.pt"
    if not path.exists():
        save(rasterise(npm_folder), path)
    return TrainingDrawings(**torch.load(path, mmap=True))


def _digest_of_sources() -> str:
    """Hash what decides how drawings are rasterised, so that older ones are never taken for them."""
    sources = [Path(module.__file__ or "") for module in (drawings, restyling)]
    content = b"".join(path.read_bytes() for path in (*sources, ICON_NAMES))
    return hashlib.sha256(content).hexdigest()[:12]


def rasterise(npm_folder: Path) -> dict[str, Any]:
    """Rasterise the training-only vendors' drawings beside the committed ones; takes minutes.

    Returns:
        Arguments of ``TrainingDrawings``.
    """
    emoji = EmojiDatasource(NOTO, npm_folder).emoji
    position = {one.text: index for index, one in enumerate(emoji)}
    english = names_from_cldr(npm_folder)["en"]
    drawn = [VendorDrawing(d.emoji, "noto", False, d.image()) for d in dataset.load_training_images()]
    for one in extra_drawings(emoji, english, npm_folder, seed=SEED_OF_STYLES):
        if one.vendor != "noto" or one.is_restyled:  # the committed drawings are Noto's own
            drawn.append(one)
    return {
        "pixels": tensor_from_images([one.image for one in drawn]),
        "classes": torch.tensor([position[one.text] for one in drawn]),
        "vendors": tuple(one.vendor for one in drawn),
        "restyled": torch.tensor([one.is_restyled for one in drawn]),
        "n_classes": len(emoji),
    }


def tensor_from_images(images: Sequence[Image.Image]) -> Tensor:
    """Stack images to uint8 (images, 3, height, width)."""
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    )


class ClassBalancedSampler:
    """Sampler of emoji, uniformly, then of one of its drawings by their weights."""

    def __init__(self, drawings: TrainingDrawings, share_restyled: float) -> None:
        weights = drawings.weights(share_restyled)
        rows = rows_by_class(drawings.classes, drawings.n_classes)
        self.rows = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        self.weights = nn.utils.rnn.pad_sequence([weights[one] for one in rows], batch_first=True)
        self.queue = torch.empty(0, dtype=torch.int64)

    def draw(self, n_rows: int) -> Tensor:
        """Draw indices of drawings, int64 (n_rows,); every emoji comes once before one comes again."""
        while len(self.queue) < n_rows:
            self.queue = torch.cat([self.queue, torch.randperm(len(self.rows))])
        emoji, self.queue = self.queue[:n_rows], self.queue[n_rows:]
        return self.rows[emoji, torch.multinomial(self.weights[emoji], 1)[:, 0]]

    def state_dict(self) -> dict[str, Any]:
        """Return the emoji that are still to come in this round."""
        return {"queue": self.queue.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the emoji that are still to come."""
        self.queue = state_dict["queue"]


def rows_by_class(classes: Tensor, n_classes: int) -> tuple[Tensor, ...]:
    """Return the int64 row indices of each class."""
    counts = classes.bincount(minlength=n_classes).tolist()
    rows: tuple[Tensor, ...] = torch.split(classes.argsort(stable=True), counts)
    return rows


def recalls(embeddings: Tensor, classes: Tensor, prototypes: Tensor) -> dict[str, float]:
    """Measure how well drawings of a vendor that was held out are found.

    Args:
        embeddings: Unit float32 (drawings, dim).
        classes: int64 (drawings,).
        prototypes: Unit float32 (classes, dim).

    Returns:
        ``top_1`` and ``top_10``: share of drawings whose emoji's prototype is among the nearest of all.
        ``recall_at_1`` and ``recall_at_10``: share that their emoji's prototype finds among these drawings.
    """
    cosines = embeddings @ prototypes.T
    by_drawing = (cosines > cosines.gather(1, classes[:, None])).sum(1)
    by_prototype = cosines[:, classes].T
    by_prototype = (by_prototype > by_prototype.diagonal()[:, None]).sum(1)
    named = {"top": by_drawing, "recall_at": by_prototype}
    return {
        f"{name}_{k}": round(float((ranks < k).float().mean()), 4)
        for name, ranks in named.items()
        for k in (1, 10)
    }


def warm_cosine(step: int, n_steps: int, *, n_warm: int = 100) -> float:
    """Return the learning rate factor: linear warm-up, then cosine decay to 0.01."""
    if step < n_warm:
        return (step + 1) / n_warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(1, n_steps - n_warm)))


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Set every group's learning rate, by its own factor ``speed`` where it has one."""
    for group in optimiser.param_groups:
        group["lr"] = value * group.get("speed", 1.0)


def unit(rows: Tensor) -> Tensor:
    """L2-normalise the last axis."""
    return functional.normalize(rows, dim=-1)
