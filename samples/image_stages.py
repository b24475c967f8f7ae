"""Stages that train the two image towers, and the workplace where every stage leaves its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from open_clip.transformer import VisionTransformer
from timm.layers import PatchDropout
from torch import Tensor, nn

from samples import towers
from samples.images import ImageSchedule, load_training_drawings, teacher_from_tower, train_image_tower

CLIP_IMAGES = ImageSchedule(
    1400, 100, towers.IMAGE_SIDE, *(towers.CLIP_PREPROCESSING[key] for key in ("mean", "std"))
)
SIGLIP_IMAGES = ImageSchedule(
    1250, 60, towers.SIGLIP_SIDE, towers.HALF, towers.HALF, batch=192, learning_rate=2e-3
)
SIGLIP_DISTILLING = ImageSchedule(
    600, 40, towers.SIGLIP_SIDE, towers.HALF, towers.HALF, batch=192, learning_rate=1.5e-3
)


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where intermediate results and npm tarballs lie."""

    folder: Path
    npm_folder: Path

    def tokenizer_folder(self, name: str) -> Path:
        """Folder of the ``nllb`` or ``xlmr`` tokenizer."""
        return self.folder / "tokenizers" / name

    def save(self, content: object, name: str) -> None:
        """Keep an intermediate result."""
        part = self.folder / f"{name}.part"
        torch.save(content, part)
        part.replace(self.folder / f"{name}.pt")

    def image_tower(self, name: str) -> tuple[dict[str, Tensor], Tensor]:
        """(weights, prototypes) of the ``clip`` or ``siglip`` image tower."""
        state, prototypes = torch.load(self.folder / f"{name}.pt")
        return state, prototypes


def train_clip_images(work: Workplace) -> None:
    """Train the image tower that nllb-clip, capivara and altclip share."""
    tower = _clip_tower()

    def drop_patches(share: float) -> None:
        tower.patch_dropout.prob = share

    drawings = load_training_drawings(work.npm_folder)
    initial = torch.randn(drawings.n_classes, towers.DIM) * 0.05
    train_image_tower(
        tower, drop_patches, drawings, CLIP_IMAGES, prototypes=initial, report=_keep(work, "clip", tower)
    )


def train_siglip_images(work: Workplace) -> None:
    """Train the SigLIP-style image tower and its prototypes from nothing."""
    tower = _siglip_tower()
    for name, parameter in tower.named_parameters():
        if name.endswith(".gamma"):
            nn.init.ones_(parameter)  # timm's 1e-5 is for long runs
    drawings = load_training_drawings(work.npm_folder)
    initial = torch.randn(drawings.n_classes, towers.SIGLIP_DIM) * 0.05
    report = _keep(work, "siglip-start", tower)
    train_image_tower(tower, _dropper(tower), drawings, SIGLIP_IMAGES, prototypes=initial, report=report)


def distil_siglip_images(work: Workplace) -> None:
    """Go on training the SigLIP-style tower, with the larger tower as its teacher."""
    tower, teacher = _siglip_tower(), _clip_tower()
    state, prototypes = work.image_tower("siglip-start")
    tower.load_state_dict(state)
    teacher_state, teacher_prototypes = work.image_tower("clip")
    teacher.load_state_dict(teacher_state)
    train_image_tower(
        tower,
        _dropper(tower),
        load_training_drawings(work.npm_folder),
        SIGLIP_DISTILLING,
        prototypes=prototypes,
        report=_keep(work, "siglip", tower),
        teacher=teacher_from_tower(teacher.eval(), teacher_prototypes, CLIP_IMAGES, SIGLIP_DISTILLING),
    )


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


def _siglip_tower() -> nn.Module:
    tower: nn.Module = timm.create_model(
        towers.SIGLIP_VISION["timm_model_name"], num_classes=0, global_pool=towers.SIGLIP_VISION["timm_pool"]
    )
    return tower


def _dropper(tower: nn.Module) -> Callable[[float], None]:
    def drop_patches(share: float) -> None:
        tower.patch_drop = PatchDropout(share, num_prefix_tokens=1) if share else nn.Identity()

    return drop_patches


def _keep(work: Workplace, name: str, tower: nn.Module) -> Callable[[int, Tensor], None]:
    def keep(_: int, prototypes: Tensor) -> None:
        work.save((tower.state_dict(), prototypes), name)

    return keep
