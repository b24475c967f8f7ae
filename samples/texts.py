"""Train a text tower towards an image tower's frozen prototypes, every language at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from open_clip.hf_model import HFTextEncoder
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
    """How long and how fast a text tower trains.

    Attributes:
        vocabulary_speed: Learning rate of token vectors, as a multiple of the others'. A token's vector moves
            only when the token is drawn; but NLLB multiplies its vectors, and so their steps, by √width.
    """

    n_steps: int
    batch: int = 256
    learning_rate: float = 2e-3
    vocabulary_speed: float = 2.0


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
    groups = [
        {"params": [one for one in trained if is_vocabulary(one)], "speed": schedule.vocabulary_speed},
        {"params": [one for one in trained if not is_vocabulary(one)], "speed": 1.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    for step, (ids, classes) in enumerate(batches(rows, schedule)):
        rate = schedule.learning_rate * warm_cosine(step, schedule.n_steps)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["speed"]
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


def is_vocabulary(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a table of token vectors: no other matrix is so tall."""
    return parameter.ndim == 2 and len(parameter) > 4096


def vectors_from_prototypes(rows: TextRows, prototypes: Tensor, n_tokens: int) -> Tensor:
    """Where token vectors start: each token at the mean of its captions' prototypes.

    A token of few emoji starts long and a token of all emoji near zero, so that a text's sum of vectors
    points to its emoji before any training.

    Returns:
        Float32 (n_tokens, dim), rows at most 1 long.
    """
    present = rows.ids != rows.pad_id
    tokens, classes = rows.ids[present], rows.classes[:, None].expand_as(rows.ids)[present]
    centred = prototypes - prototypes.mean(0)
    sums = torch.zeros(n_tokens, prototypes.shape[1]).index_add_(0, tokens, centred[classes])
    return sums / tokens.bincount(minlength=n_tokens).clamp(min=1)[:, None]


def xlmr_bag(text: HFTextEncoder) -> Callable[[Tensor], Tensor]:
    """A mean-pooled XLM-R tower without its layers: ids → (rows, dim), at a tenth of the cost."""

    def bag(ids: Tensor) -> Tensor:
        present = (ids != text.config.pad_token_id)[..., None].float()
        vectors = text.transformer.embeddings(input_ids=ids)
        return torch.as_tensor(text.proj((vectors * present).sum(1) / present.sum(1)))

    return bag


def nllb_bag(text: HFTextEncoder) -> Callable[[Tensor], Tensor]:
    """An NLLB tower with only the first layer's values, evenly attended: ids → (rows, dim)."""
    encoder, layer = text.transformer, text.transformer.layers[0]

    def bag(ids: Tensor) -> Tensor:
        present = (ids != text.config.pad_token_id)[..., None].float()
        vectors = encoder.embed_tokens(ids)
        vectors = vectors + encoder.embed_positions(ids, vectors)
        mean = (layer.self_attn_layer_norm(vectors) * present).sum(1) / present.sum(1)
        attended = layer.self_attn.out_proj(layer.self_attn.v_proj(mean))
        return torch.as_tensor(text.proj(encoder.layer_norm(vectors[:, 0] + attended)))

    return bag


@torch.no_grad()
def start_as_mean(attention: dict[str, nn.Linear], quiet: Iterable[nn.Linear], *, strength: float) -> None:
    """Start a layer as the plain mean of its tokens, and other layers as nearly nothing.

    Every token, the pooled one too, then holds what the whole text holds; training departs from there.
    """
    for name in ("query", "key"):
        attention[name].weight.mul_(0.1)
    nn.init.eye_(attention["value"].weight)
    nn.init.eye_(attention["output"].weight).mul_(strength)
    for linear in quiet:
        linear.weight.mul_(0.2)


@torch.no_grad()
def fit_projection(projection: nn.Linear, features: Tensor, wanted: Tensor) -> None:
    """Start a projection without bias at the least-squares map from features to prototypes."""
    projection.weight.copy_(torch.linalg.lstsq(features, wanted).solution.T)


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
