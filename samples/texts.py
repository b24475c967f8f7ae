"""Train a text tower towards an image tower's frozen prototypes, in all languages at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from samples.images import LOGIT_SCALE, rows_by_class, set_learning_rate, unit, warm_cosine
from samples.towers import MatryoshkaHeads
from samples.training import ResumableRun, Stateful, computing_dtype

VOCABULARY_SPEED = 3.0
N_BATCHES_SORTED = 16  # drawn together and sorted by length, to reduce padding


@dataclass(frozen=True, slots=True)
class TextRows:
    """Tokenized captions.

    Attributes:
        ids: int64 (captions, length), padded on the right.
        classes: int64 (captions,), index of the emoji.
        weights: Float32 (captions,), sampling weights.
        pad_id: Padding token.
    """

    ids: Tensor
    classes: Tensor
    weights: Tensor
    pad_id: int


@dataclass(frozen=True, slots=True)
class TextSchedule:
    """Training schedule of a text tower; an epoch draws as many captions as there are.

    ``cross_entropy`` and ``alignment`` are the weights of the classification loss and of the cosine to the
    prototype: the former learns faster, the latter improves retrieval of unseen drawings.
    """

    n_epochs: float
    batch: int = 1024
    learning_rate: float = 2e-3
    cross_entropy: float = 1.0
    alignment: float = 10.0


def train_text_tower(
    tower: nn.Module, rows: TextRows, prototypes: Tensor, schedule: TextSchedule, path: Path
) -> None:
    """Train a text tower to map captions to their emoji's prototype, or continue where it was stopped.

    Args:
        tower: Module from int64 (rows, length) to float (rows, dim); parameters that require a gradient are
            trained.
        rows: Training data.
        prototypes: Unit float32 (classes, dim).
        schedule: Epochs and rate.
        path: Path of the run's state and curve, see ``ResumableRun``.
    """
    without_dropout(tower.train())
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    # Token vectors are updated only when their token is drawn, so they get a higher learning rate.
    groups = [
        {"params": [one for one in trained if is_vocabulary(one)], "speed": VOCABULARY_SPEED},
        {"params": [one for one in trained if not is_vocabulary(one)], "speed": 1.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    n_steps = int(schedule.n_epochs * len(rows.ids) / schedule.batch)
    batches = SortedBatches(rows, schedule.batch)
    parts: dict[str, Stateful] = {"tower": tower, "optimiser": optimiser, "batches": batches}
    run = ResumableRun(path, parts, {**asdict(schedule), "n_rows": len(rows.ids)}, n_steps)
    targets = prototypes.to(computing_dtype())
    is_half = targets.dtype is torch.bfloat16
    for step in run.steps():
        ids, classes = batches.draw()
        set_learning_rate(optimiser, schedule.learning_rate * warm_cosine(step, n_steps))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half), sdpa_kernel(SDPBackend.MATH):
            embedding = tower(ids)
        found = unit(embedding.float())
        own = (found * prototypes[classes]).sum(1).mean()
        cosines = (found.to(targets.dtype) @ targets.T).float()
        loss = schedule.alignment * (1 - own)
        loss = loss + schedule.cross_entropy * functional.cross_entropy(LOGIT_SCALE * cosines, classes)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if step % 200 == 199 or step + 1 == n_steps:
            right = (cosines.argmax(1) == classes).float().mean()
            run.record(loss=round(loss.item(), 4), own_prototype_first=round(right.item(), 4))


def without_dropout(tower: nn.Module) -> None:
    """Disable all dropout in a transformers model; 1.5 million weights are too few to need it."""
    for module in tower.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def is_vocabulary(parameter: nn.Parameter) -> bool:
    """Return True for a table of token vectors, the only matrices with so many rows."""
    return parameter.ndim == 2 and len(parameter) > 4096


@torch.no_grad()
def start_text_tower(tower: nn.Module, vocabulary: Tensor, rows: TextRows, prototypes: Tensor) -> None:
    """Initialise linear layers as fairseq does, and each token as the mean of its captions' prototypes.

    transformers' initial weights are so small that little of the tokens reaches a pooled position at this
    width. If the vocabulary is narrower, the prototypes are projected on their first principal axes. Tokens
    of few emoji start with a large norm, tokens of all emoji near zero.
    """
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    n_tokens, width = vocabulary.shape
    centred = prototypes - prototypes.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:width]
    present = rows.ids != rows.pad_id
    tokens, classes = rows.ids[present], rows.classes[:, None].expand_as(rows.ids)[present]
    sums = torch.zeros(n_tokens, width).index_add_(0, tokens, (centred @ axes.T)[classes])
    means = sums / tokens.bincount(minlength=n_tokens).clamp(min=1)[:, None]
    vocabulary.copy_(torch.randn_like(vocabulary) * 0.02 + 1.5 * means)


class SortedBatches:
    """Batches of captions drawn by their weights, of similar lengths and cut to the longest."""

    def __init__(self, rows: TextRows, batch: int) -> None:
        self.rows, self.batch = rows, batch
        self.lengths = (rows.ids != rows.pad_id).sum(1)
        self.queue: list[Tensor] = []

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw ids, int64 (batch, length), and classes, int64 (batch,)."""
        if not self.queue:
            drawn = torch.multinomial(self.rows.weights, N_BATCHES_SORTED * self.batch, replacement=True)
            by_length = torch.split(drawn[self.lengths[drawn].argsort()], self.batch)
            self.queue = [by_length[index] for index in torch.randperm(N_BATCHES_SORTED).tolist()]
        picked = self.queue.pop()
        return self.rows.ids[picked, : int(self.lengths[picked].max())], self.rows.classes[picked]

    def state_dict(self) -> dict[str, Any]:
        """Return the batches that are drawn already."""
        return {"queue": [picked.clone() for picked in self.queue]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the batches that were drawn already."""
        self.queue = list(state_dict["queue"])


def train_matryoshka(
    heads: MatryoshkaHeads,
    images: tuple[Tensor, Tensor],
    texts: tuple[Tensor, Tensor],
    n_classes: int,
    *,
    n_steps: int,
) -> None:
    """Train the MRL heads on precomputed embeddings with a contrastive loss between images and texts.

    Args:
        heads: One head per width.
        images: Embeddings, float32 (images, dim), not normalised; classes, int64 (images,).
        texts: Embeddings and classes of the captions, in the same form.
        n_classes: Number of emoji.
        n_steps: Number of steps, each with 512 emoji, one image and one caption of each.
    """
    optimiser = torch.optim.AdamW(heads.parameters(), weight_decay=0.0)
    by_class = [rows_by_class(classes, n_classes) for _, classes in (images, texts)]
    for step in range(n_steps):
        set_learning_rate(optimiser, 2e-3 * warm_cosine(step, n_steps))
        classes = torch.randperm(n_classes)[:512].tolist()
        picked = [
            torch.stack([rows[one][torch.randint(len(rows[one]), ())] for one in classes])
            for rows in by_class
        ]
        outputs = [
            heads(embeddings[rows]) for (embeddings, _), rows in zip((images, texts), picked, strict=True)
        ]
        loss = sum(
            (contrastive(outputs[0][width], outputs[1][width]) for width in outputs[0]), torch.zeros(())
        )
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        if step % 200 == 199:
            print(f"heads step {step + 1}/{n_steps} loss {loss.item():.3f}", flush=True)


def contrastive(images: Tensor, texts: Tensor) -> Tensor:
    """Compute the symmetric cross-entropy of matching rows, as in CLIP."""
    logits = LOGIT_SCALE * unit(images) @ unit(texts).T
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
