"""Training stages of the image towers, and the work folder for intermediate results.

A convolutional network learns first; the transformers that the samples need learn from it. Every stage can be
stopped at any time and continues where it was.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from samples import towers
from samples.fast_vit import ComputingCopy, clip_embedded, siglip_embedded
from samples.image_training import (
    Data,
    ImageSchedule,
    Prototypes,
    Student,
    clip_statistics,
    resized,
    train_student,
)
from samples.images import (
    LABEL_SMOOTHING,
    ImageSettings,
    load_training_drawings,
    set_learning_rate,
    unit,
)
from samples.teacher import teacher
from samples.training import computing_dtype, save

WATCHED_DESIGN, WATCHED_EVERY = "emojione", 8
TEACHER_WIDTH = 64
TEACHER = ImageSchedule(2_000, 256, 3e-3, side=40)
CLIP_IMAGES = ImageSchedule(3_000, 128, 1.5e-3, share_masked=0.95)
CLIP_IMAGES_AGAIN = ImageSchedule(3_500, 128, 1e-3, share_masked=0.92)
SIGLIP_IMAGES = ImageSchedule(400, 128, 7e-4, n_warm=40, share_masked=0.9)
POOLING_SPEED = 2.0  # SigLIP's attention pooling starts from random weights
SIGLIP_IMAGES_AGAIN = ImageSchedule(500, 128, 6e-4, n_warm=40, share_masked=0.9)
N_FITTING_STEPS = 2500
FITTING_DRAWINGS_PER_STEP = 12
FITTING_SCALE = 10.0
TEXT_NOISE = 0.6  # length of a random vector that leaves texts' mean cosine of 0.86 to their prototype


@dataclass(frozen=True, slots=True)
class Workplace:
    """Folders of intermediate results and npm tarballs, and how the image towers learn.

    Attributes:
        folder: Folder of intermediate results.
        npm_folder: Folder of npm tarballs, and of the drawings rasterised from them.
        held_out: Design that no tower sees and that the curves are measured on, to choose settings; None to
            learn from all, but for one design's drawings of every eighth emoji, to measure the curves on.
        steps: Factor on the image stages' steps, for short trials.
        settings: Settings of the image stages.
    """

    folder: Path
    npm_folder: Path
    held_out: str | None = None
    steps: float = 1.0
    settings: ImageSettings = field(default_factory=ImageSettings)

    def tokenizer_folder(self, name: str) -> Path:
        """Return the folder of the ``nllb`` or ``xlmr`` tokenizer."""
        return self.folder / "tokenizers" / name

    def save(self, content: object, name: str) -> None:
        """Save an intermediate result."""
        save(content, self.folder / f"{name}.pt")

    def image_tower(self, name: str) -> tuple[dict[str, Tensor], Tensor]:
        """Load (weights, prototypes) of the ``teacher``, ``clip`` or ``siglip`` image tower."""
        state, prototypes, *_ = torch.load(self.folder / f"{name}.pt")
        return state, prototypes

    def data(self) -> Data:
        """Load the drawings to learn from, and those that are held out."""
        drawings = load_training_drawings(self.npm_folder).without(self.settings.without)
        if self.held_out is None:
            return Data(*drawings.split(WATCHED_DESIGN, every=WATCHED_EVERY), self.settings)
        return Data(*drawings.split(self.held_out), self.settings)

    def n_steps(self, n_steps: int) -> int:
        """Shorten a stage."""
        return max(1, round(n_steps * self.steps))


class ConvolutionalStudent(Student):
    """The teacher, while it learns."""

    def embed(self, pixels: Tensor, *, drop: float) -> Tensor:
        """Embed a batch; it drops nothing."""
        return self.embed_with(self.tower, pixels)

    def embed_with(self, tower: nn.Module, pixels: Tensor) -> Tensor:
        """Embed a batch in mixed precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=computing_dtype() is torch.bfloat16):
            return torch.as_tensor(tower(pixels.contiguous(memory_format=torch.channels_last))).float()


class TransformerStudent(Student):
    """A vision transformer, which computes in ``computing_dtype``."""

    quick: ComputingCopy

    def embed(self, pixels: Tensor, *, drop: float) -> Tensor:
        """Embed a batch with the present weights."""
        self.quick.refresh()
        return self.quick.embed(self.seen(pixels), drop=drop)

    def embed_with(self, tower: nn.Module, pixels: Tensor) -> Tensor:
        """Embed a batch in float32."""
        return torch.as_tensor(tower(self.seen(pixels)))

    def seen(self, pixels: Tensor) -> Tensor:
        """Convert pixels from CLIP's normalisation to the tower's."""
        return pixels

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients and hand them to the float32 weights."""
        super().backward(loss)
        self.quick.return_gradients()


class ClipStudent(TransformerStudent):
    """open_clip's vision transformer."""

    def __init__(self, tower: VisionTransformer, prototypes: Prototypes) -> None:
        super().__init__(tower, prototypes)
        self.quick = ComputingCopy(tower, clip_embedded)


class SiglipStudent(TransformerStudent):
    """timm's SigLIP tower."""

    def __init__(self, tower: nn.Module, prototypes: Prototypes) -> None:
        super().__init__(tower, prototypes)
        self.quick = ComputingCopy(tower, siglip_embedded)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Give the pooling, which starts from random weights, a higher rate."""
        named = list(self.tower.named_parameters())
        pooling = [weights for name, weights in named if name.startswith("attn_pool.")]
        blocks = [weights for name, weights in named if not name.startswith("attn_pool.")]
        return [
            {"params": pooling, "weight_decay": weight_decay, "speed": POOLING_SPEED},
            {"params": blocks, "weight_decay": weight_decay, "speed": 1.0},
        ]

    def seen(self, pixels: Tensor) -> Tensor:
        """Convert pixels from CLIP's normalisation to ±1."""
        return siglip_from_clip_pixels(pixels)


def train_teacher(work: Workplace) -> None:
    """Train the convolutional teacher and its prototypes: classification of every vendor's drawings."""
    data = work.data()
    prototypes = Prototypes(torch.randn(data.drawings.n_classes, towers.DIM) * 0.05, learned=True)
    student = ConvolutionalStudent(teacher(towers.DIM, TEACHER_WIDTH).train(), prototypes)
    network, rows = train_student(
        student, data, TEACHER, work.folder / "teacher", n_steps=work.n_steps(TEACHER.n_steps)
    )
    work.save((network.state_dict(), rows), "teacher")


def train_clip_images(work: Workplace) -> None:
    """Train the image tower of nllb-clip, capivara and altclip: the teacher's embeddings and its classes."""
    data = work.data()
    network = teacher(towers.DIM, TEACHER_WIDTH)
    state, rows = work.image_tower("teacher")
    network.load_state_dict(state)
    instructor = ConvolutionalStudent(network.eval(), Prototypes(rows, learned=False))

    @torch.no_grad()
    def teach(pixels: Tensor) -> Tensor:
        return unit(instructor.embed(resized(pixels, TEACHER.side), drop=0.0))

    tower: Any = _clip_tower()
    for name, schedule in (("clip", CLIP_IMAGES), ("clip-again", CLIP_IMAGES_AGAIN)):
        student = ClipStudent(tower.train(), Prototypes(rows, learned=False))
        n_steps = work.n_steps(schedule.n_steps)
        tower, _ = train_student(student, data, schedule, work.folder / name, n_steps=n_steps, teach=teach)
    n_fitting_steps = work.n_steps(N_FITTING_STEPS)
    fitted = fitted_prototypes(tower, data, FITTING_SCALE, n_steps=n_fitting_steps)
    work.save((tower.state_dict(), fitted), "clip")
    if work.held_out:
        scales = {
            scale: fitted_prototypes(tower, data, scale, n_steps=n_fitting_steps) for scale in (5.0, 20.0)
        }
        for scale, found in {FITTING_SCALE: fitted, **scales}.items():
            blurred = unit(found + TEXT_NOISE * unit(torch.randn_like(found)))
            figures = {"exact": data.recalls(tower, found), "as_texts_are": data.recalls(tower, blurred)}
            print(f"clip with prototypes fitted at scale {scale:g} {json.dumps(figures)}", flush=True)


def train_siglip_images(work: Workplace) -> None:
    """Train a SigLIP tower from the CLIP tower's blocks, with attention pooling instead of the class token.

    The CLIP tower is its teacher. SigLIP's space is wider; the CLIP prototypes are embedded in it by an
    orthonormal map, so that a text tower can be moved to it by the same map without training.
    """
    clip = _clip_tower()
    state, prototypes = work.image_tower("clip")
    clip.load_state_dict(state)
    clip.eval()
    quick = ComputingCopy(clip, clip_embedded)
    tower = siglip_from_clip(clip)
    lift = torch.linalg.qr(torch.randn(towers.SIGLIP_DIM, towers.DIM))[0]

    @torch.no_grad()
    def teach(pixels: Tensor) -> Tensor:
        return torch.as_tensor(unit(quick.embed(pixels)) @ lift.T)

    data, lifted = work.data(), prototypes @ lift.T
    for name, schedule in (("siglip", SIGLIP_IMAGES), ("siglip-again", SIGLIP_IMAGES_AGAIN)):
        student = SiglipStudent(tower.train(), Prototypes(lifted, learned=False))
        n_steps = work.n_steps(schedule.n_steps)
        tower, _ = train_student(student, data, schedule, work.folder / name, n_steps=n_steps, teach=teach)
    work.save((tower.state_dict(), lifted, lift), "siglip")


def fitted_prototypes(tower: nn.Module, data: Data, scale: float, *, n_steps: int) -> Tensor:
    """Fit prototypes, unit float32 (emoji, dim), that classify the trained tower's embeddings.

    Prototypes learned together with a tower also fit its earlier states, and class means ignore other
    emoji; both retrieve fewer unseen drawings. A logit scale below the tower's own keeps similar emoji close,
    so that an inaccurate text embedding still retrieves the right one.
    """
    means, embeddings, classes = _embeddings_of_drawings(tower, data, FITTING_DRAWINGS_PER_STEP * n_steps)
    fitted = nn.Parameter(means.clone())
    optimiser = torch.optim.Adam([fitted])
    for step in range(n_steps):
        set_learning_rate(optimiser, 2e-3 * (1 - step / n_steps))
        rows = torch.randint(len(embeddings), (512,))
        logits = scale * embeddings[rows] @ unit(fitted).T
        loss = functional.cross_entropy(logits, classes[rows], label_smoothing=LABEL_SMOOTHING)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
    return torch.as_tensor(unit(fitted.detach()))


@torch.no_grad()
def _embeddings_of_drawings(tower: nn.Module, data: Data, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embed changed drawings: unit class means (emoji, dim), embeddings (rows, dim), classes (rows,)."""
    rows, quick = data.sampler().draw(n_rows), copy.deepcopy(tower).to(computing_dtype())
    parts = [
        unit(clip_embedded(quick, data.augmented(part).to(computing_dtype())).float())
        for part in torch.split(rows, 512)
    ]
    embeddings, classes = torch.cat(parts), data.drawings.classes[rows]
    sums = torch.zeros(data.drawings.n_classes, towers.DIM).index_add_(0, classes, embeddings)
    return unit(sums), embeddings, classes


@torch.no_grad()
def siglip_from_clip(clip: VisionTransformer) -> nn.Module:
    """Initialise a SigLIP tower with a CLIP tower's patches, positions and blocks.

    CLIP's different pixel normalisation is folded into the patch embedding, and its layer norm before the
    blocks is approximated by one factor.
    """
    trunk = towers.SIGLIP_TRUNK
    arguments = trunk["model_args"]
    tower: Any = timm.create_model(trunk["architecture"], num_classes=0, global_pool="map", **arguments)
    mean, std = clip_statistics()
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


def siglip_from_clip_pixels(pixels: Tensor) -> Tensor:
    """Convert pixels in CLIP's normalisation to ±1."""
    mean, std = clip_statistics()
    return (pixels * std + mean) * 2 - 1


def _clip_tower() -> VisionTransformer:
    return VisionTransformer(
        image_size=towers.IMAGE_SIDE,
        patch_size=towers.PATCH,
        width=towers.IMAGE_WIDTH,
        layers=towers.IMAGE_LAYERS,
        heads=towers.IMAGE_HEADS,
        mlp_ratio=4,
        output_dim=towers.DIM,
    )
