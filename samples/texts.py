"""Train a text tower towards an image tower's frozen prototypes, every language at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from samples.images import LOGIT_SCALE, set_learning_rate, unit, warm_cosine
from samples.towers import MatryoshkaHeads

ALIGNMENT = 5.0  # weight of the plain cosine beside the cross-entropy
N_BATCHES_SORTED = 16  # drawn together and sorted by length, so that little is padding


@dataclass(frozen=True, slots=True)
class TextRows:
    """Tokenised captions.

    Attributes:
        ids: int64 (captions, length), padded on the right.
        classes: int64 (captions,), index of the emoji.
        weights: Float32 (captions,), how often to draw each one.
        pad_id: Padding token.
    """

    ids: Tensor
    classes: Tensor
    weights: Tensor
    pad_id: int


@dataclass(frozen=True, slots=True)
class TextSchedule:
    """How long and how fast a text tower trains."""

    n_steps: int
    batch: int = 1024
    learning_rate: float = 2e-3


def train_text_tower(
    tower: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    rows: TextRows,
    prototypes: Tensor,
    schedule: TextSchedule,
    *,
    report: Callable[[int], None] = lambda _: None,
) -> None:
    """Move every caption of an emoji to the emoji's prototype.

    Args:
        tower: int64 (rows, length) → float (rows, dim).
        parameters: What to train.
        rows: What to train on.
        prototypes: Unit float32 (classes, dim).
        schedule: Steps and rate.
        report: Called every 200 steps.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.0)
    for step, (ids, classes) in enumerate(batches(rows, schedule)):
        set_learning_rate(optimiser, schedule.learning_rate * warm_cosine(step, schedule.n_steps))
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embedding = tower(ids)
        cosines = unit(embedding.float()) @ prototypes.T
        own = cosines.gather(1, classes[:, None]).mean()
        loss = functional.cross_entropy(LOGIT_SCALE * cosines, classes) + ALIGNMENT * (1 - own)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if step % 100 == 99:
            right = (cosines.argmax(1) == classes).float().mean()
            print(
                f"text step {step + 1}/{schedule.n_steps} loss {loss.item():.3f} "
                f"cosine {own.item():.3f} own prototype first {right.item():.3f}",
                flush=True,
            )
        if step % 200 == 199:
            report(step + 1)


def batches(rows: TextRows, schedule: TextSchedule) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, classes) of similar lengths, cut to the longest."""
    lengths = (rows.ids != rows.pad_id).sum(1)
    for start in range(0, schedule.n_steps, N_BATCHES_SORTED):
        n_batches = min(N_BATCHES_SORTED, schedule.n_steps - start)
        drawn = torch.multinomial(rows.weights, n_batches * schedule.batch, replacement=True)
        by_length = torch.split(drawn[lengths[drawn].argsort()], schedule.batch)
        for index in torch.randperm(n_batches).tolist():
            picked = by_length[index]
            yield rows.ids[picked, : int(lengths[picked].max())], rows.classes[picked]


def train_matryoshka(
    heads: MatryoshkaHeads,
    images: tuple[Tensor, Tensor],
    texts: tuple[Tensor, Tensor],
    n_classes: int,
    *,
    n_steps: int,
) -> None:
    """Train the narrow heads on finished embeddings, image against text.

    Args:
        heads: One head a width.
        images: Embeddings, float32 (images, dim), not normalised; classes, int64 (images,).
        texts: The same for captions.
        n_classes: Number of emoji.
        n_steps: Each draws 512 emoji with one image and one caption.
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


def rows_by_class(classes: Tensor, n_classes: int) -> tuple[Tensor, ...]:
    """Class → int64 indices of its rows."""
    counts = classes.bincount(minlength=n_classes).tolist()
    rows: tuple[Tensor, ...] = torch.split(classes.argsort(stable=True), counts)
    return rows


def contrastive(images: Tensor, texts: Tensor) -> Tensor:
    """Symmetric cross-entropy of matching rows, as in CLIP."""
    logits = LOGIT_SCALE * unit(images) @ unit(texts).T
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
