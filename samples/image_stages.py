"""Training stages of the two image towers, and the work folder for intermediate results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from samples import towers
from samples.images import (
    LABEL_SMOOTHING,
    LOGIT_SCALE,
    ClassBalancedSampler,
    ImageSchedule,
    TrainingDrawings,
    augmented,
    load_training_drawings,
    set_learning_rate,
    train_image_tower,
    unit,
    warm_cosine,
)

CLIP_IMAGES = ImageSchedule(
    1400, 100, towers.IMAGE_SIDE, *(towers.CLIP_PREPROCESSING[key] for key in ("mean", "std"))
)
SIGLIP_IMAGES = ImageSchedule(
    0, 600, towers.IMAGE_SIDE, towers.HALF, towers.HALF, batch=128, learning_rate=7e-4
)
POOLING_SPEED = 2.0  # SigLIP's attention pooling starts from random weights
N_AUGMENTATIONS = 3
N_FITTING_STEPS = 5000
FITTING_SCALE = 10.0
RESEMBLANCE = 10.0  # weight of the cosine to the teacher relative to the cross-entropy


@dataclass(frozen=True, slots=True)
class Workplace:
    """Folders of intermediate results and npm tarballs."""

    folder: Path
    npm_folder: Path

    def tokenizer_folder(self, name: str) -> Path:
        """Return the folder of the ``nllb`` or ``xlmr`` tokenizer."""
        return self.folder / "tokenizers" / name

    def save(self, content: object, name: str) -> None:
        """Save an intermediate result atomically."""
        part = self.folder / f"{name}.part"
        torch.save(content, part)
        part.replace(self.folder / f"{name}.pt")

    def image_tower(self, name: str) -> tuple[dict[str, Tensor], Tensor]:
        """Load (weights, prototypes) of the ``clip`` or ``siglip`` image tower."""
        state, prototypes, *_ = torch.load(self.folder / f"{name}.pt")
        return state, prototypes


def train_clip_images(work: Workplace) -> None:
    """Train the image tower shared by nllb-clip, capivara and altclip."""
    tower = _clip_tower()

    def drop_patches(share: float) -> None:
        tower.patch_dropout.prob = share

    drawings = load_training_drawings(work.npm_folder)
    initial = torch.randn(drawings.n_classes, towers.DIM) * 0.05
    train_image_tower(
        tower, drop_patches, drawings, CLIP_IMAGES, prototypes=initial, report=_keep(work, "clip", tower)
    )
    work.save((tower.state_dict(), fitted_prototypes(tower, drawings)), "clip")


def fitted_prototypes(tower: nn.Module, drawings: TrainingDrawings) -> Tensor:
    """Fit prototypes, unit float32 (classes, dim), that classify the trained tower's embeddings.

    Prototypes learned together with the tower also fit its earlier states, and class means ignore other
    emoji; both retrieve fewer unseen drawings. A logit scale below the tower's own keeps similar emoji close,
    so that an inaccurate text embedding still retrieves the right one.
    """
    means, embeddings, classes = _embeddings_of_drawings(tower, drawings)
    fitted = nn.Parameter(means.clone())
    optimiser = torch.optim.Adam([fitted])
    for step in range(N_FITTING_STEPS):
        set_learning_rate(optimiser, 2e-3 * (1 - step / N_FITTING_STEPS))
        rows = torch.randint(len(embeddings), (512,))
        logits = FITTING_SCALE * embeddings[rows] @ unit(fitted).T
        loss = nn.functional.cross_entropy(logits, classes[rows], label_smoothing=LABEL_SMOOTHING)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
    return unit(fitted.detach())


@torch.no_grad()
def _embeddings_of_drawings(tower: nn.Module, drawings: TrainingDrawings) -> tuple[Tensor, Tensor, Tensor]:
    """Embed augmented drawings: unit class means (classes, dim), embeddings (rows, dim), classes (rows,)."""
    parts = list(zip(torch.split(drawings.pixels, 512), torch.split(drawings.classes, 512), strict=True))
    parts *= N_AUGMENTATIONS
    embeddings = torch.cat([unit(tower(augmented(pixels.float() / 255, CLIP_IMAGES))) for pixels, _ in parts])
    classes = torch.cat([part for _, part in parts])
    sums = torch.zeros(drawings.n_classes, towers.DIM).index_add_(0, classes, embeddings)
    return unit(sums), embeddings, classes


def train_siglip_images(work: Workplace) -> None:
    """Train a SigLIP tower from the CLIP tower's blocks, with attention pooling instead of the class token.

    The CLIP tower is the teacher. SigLIP's space is wider; the CLIP prototypes are embedded in it by an
    orthonormal map, so that a text tower can be moved to it by the same map without training.
    """
    teacher, drawings = _clip_tower(), load_training_drawings(work.npm_folder)
    state, prototypes = work.image_tower("clip")
    teacher.load_state_dict(state)
    teacher.patch_dropout.prob = 0.0
    teacher.eval()
    tower = siglip_from_clip(teacher)
    lift = torch.linalg.qr(torch.randn(towers.SIGLIP_DIM, towers.DIM))[0]
    lifted = prototypes @ lift.T
    pooling = [p for name, p in tower.named_parameters() if name.startswith("attn_pool.")]
    blocks = [p for name, p in tower.named_parameters() if not name.startswith("attn_pool.")]
    groups = [{"params": pooling, "speed": POOLING_SPEED}, {"params": blocks, "speed": 1.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    sampler, schedule = ClassBalancedSampler(drawings), SIGLIP_IMAGES
    for step in range(schedule.n_steps):
        rate = schedule.learning_rate * warm_cosine(step, schedule.n_steps, n_warm=40)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["speed"]
        rows = sampler.draw(schedule.batch)
        pixels = augmented(drawings.pixels[rows].float() / 255, schedule)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted = unit(teacher(clip_from_siglip_pixels(pixels)).float()) @ lift.T
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embedding = tower(pixels)
        found = unit(embedding.float())
        logits = LOGIT_SCALE * found @ lifted.T
        loss = nn.functional.cross_entropy(logits, drawings.classes[rows], label_smoothing=LABEL_SMOOTHING)
        loss = loss + RESEMBLANCE * (1 - (found * wanted).sum(1).mean())
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            print(f"siglip step {step + 1}/{schedule.n_steps} loss {loss.item():.3f}", flush=True)
    work.save((tower.state_dict(), lifted, lift), "siglip")


@torch.no_grad()
def siglip_from_clip(clip: VisionTransformer) -> nn.Module:
    """Initialise a SigLIP tower with a CLIP tower's patches, positions and blocks.

    CLIP's different pixel normalisation is folded into the patch embedding, and its layer norm before the
    blocks is approximated by one factor.
    """
    trunk = towers.SIGLIP_TRUNK
    arguments = trunk["model_args"]
    tower: Any = timm.create_model(trunk["architecture"], num_classes=0, global_pool="map", **arguments)
    mean, std = _clip_statistics()
    weight = clip.conv1.weight
    tower.patch_embed.proj.weight.copy_(weight * (0.5 / std))
    tower.patch_embed.proj.bias.copy_((weight * (0.5 - mean) / std).sum((1, 2, 3)))
    tower.pos_embed.copy_(clip.positional_embedding[1:])
    pixels = torch.rand(64, 3, towers.IMAGE_SIDE, towers.IMAGE_SIDE)
    after = clip._embeds((pixels - mean) / std)[:, 1:].std()
    before = (tower.patch_embed((pixels - 0.5) / 0.5) + tower.pos_embed).std()
    for tensor in (tower.patch_embed.proj.weight, tower.patch_embed.proj.bias, tower.pos_embed):
        tensor.mul_(after / before)
    for ours, theirs in zip(tower.blocks, clip.transformer.resblocks, strict=True):
        ours.norm1.load_state_dict(theirs.ln_1.state_dict())
        ours.norm2.load_state_dict(theirs.ln_2.state_dict())
        ours.attn.qkv.weight.copy_(theirs.attn.in_proj_weight)
        ours.attn.qkv.bias.copy_(theirs.attn.in_proj_bias)
        ours.attn.proj.load_state_dict(theirs.attn.out_proj.state_dict())
        ours.mlp.fc1.load_state_dict(theirs.mlp.c_fc.state_dict())
        ours.mlp.fc2.load_state_dict(theirs.mlp.c_proj.state_dict())
    tower.norm.load_state_dict(clip.ln_post.state_dict())
    module: nn.Module = tower.train()
    return module


def clip_from_siglip_pixels(pixels: Tensor) -> Tensor:
    """Convert pixels normalised to ±1 to CLIP's normalisation."""
    mean, std = _clip_statistics()
    return (pixels * 0.5 + 0.5 - mean) / std


def _clip_statistics() -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(towers.CLIP_PREPROCESSING[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return mean, std


def _clip_tower() -> VisionTransformer:
    return VisionTransformer(
        image_size=towers.IMAGE_SIDE,
        patch_size=towers.PATCH,
        width=towers.IMAGE_WIDTH,
        layers=towers.IMAGE_LAYERS,
        heads=towers.IMAGE_HEADS,
        mlp_ratio=4,
        patch_dropout=0.5,
        output_dim=towers.DIM,
    )


def _keep(work: Workplace, name: str, tower: nn.Module) -> Callable[[int, Tensor], None]:
    def keep(_: int, prototypes: Tensor) -> None:
        work.save((tower.state_dict(), prototypes), name)

    return keep
