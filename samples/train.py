"""Train the sample checkpoints from the sample data; tens of minutes on two cores.

    python -m samples.train --work FOLDER [--stages STAGE ...]

Each stage leaves its result in the work folder, so a stage can be run again by itself.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import timm
import torch
from open_clip.model import CustomTextCLIP
from open_clip.transformer import VisionTransformer
from timm.layers import PatchDropout
from torch import Tensor, nn
from transformers import AltCLIPModel, AutoTokenizer, PreTrainedTokenizerBase

from samples import dataset, folders, towers
from samples.images import ImageSchedule, TrainingDrawings, load_training_drawings, train_image_tower
from samples.texts import TextRows, TextSchedule, train_matryoshka, train_text_tower
from samples.vocabulary import ids_from_captions, write_nllb_tokenizer, write_xlmr_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "samples" / "checkpoints"
SEED = 20240
PORTUGUESE = "por_Latn"
MAX_LENGTH = 64  # longer than any caption

CLIP_IMAGES = ImageSchedule(1400, 100, towers.IMAGE_SIDE, *(towers.CLIP_PREPROCESSING[key] for key in ("mean", "std")))
SIGLIP_IMAGES = ImageSchedule(
    1250, 60, towers.SIGLIP_SIDE, towers.HALF, towers.HALF, batch=192, learning_rate=2e-3
)
FULL = TextSchedule(2000)
FINE_TUNING = TextSchedule(600, learning_rate=1e-3)
ADAPTER = TextSchedule(300, learning_rate=1e-3)


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


def train_tokenizers(work: Workplace) -> None:
    """Train both tokenizers."""
    captions = dataset.load_captions()
    write_nllb_tokenizer(captions, work.tokenizer_folder("nllb"))
    write_xlmr_tokenizer(captions, work.tokenizer_folder("xlmr"))


def train_clip_images(work: Workplace) -> None:
    """Train the image tower that nllb-clip, capivara and altclip share."""
    tower = VisionTransformer(
        image_size=towers.IMAGE_SIDE,
        patch_size=towers.PATCH,
        width=towers.IMAGE_WIDTH,
        layers=towers.IMAGE_LAYERS,
        heads=towers.IMAGE_HEADS,
        mlp_ratio=4,
        patch_dropout=0.5,
        output_dim=towers.DIM,
    )

    def drop_patches(share: float) -> None:
        tower.patch_dropout.prob = share

    _train_images(work, "clip", tower, drop_patches, CLIP_IMAGES, towers.DIM)


def train_siglip_images(work: Workplace) -> None:
    """Train the SigLIP-style image tower."""
    tower = timm.create_model(towers.SIGLIP_VISION["timm_model_name"], num_classes=0, global_pool="map")
    for name, parameter in tower.named_parameters():
        if name.endswith(".gamma"):
            nn.init.ones_(parameter)  # timm's 1e-5 is for deep towers and long runs

    def drop_patches(share: float) -> None:
        tower.patch_drop = PatchDropout(share, num_prefix_tokens=1) if share else nn.Identity()

    _train_images(work, "siglip", tower, drop_patches, SIGLIP_IMAGES, towers.SIGLIP_DIM)


def _train_images(
    work: Workplace,
    name: str,
    tower: nn.Module,
    drop_patches: Callable[[float], None],
    schedule: ImageSchedule,
    dim: int,
) -> None:
    drawings = load_training_drawings(work.npm_folder)

    def keep(step: int, prototypes: Tensor) -> None:
        if step % 200 == 0 or step == schedule.n_steps:
            work.save((tower.state_dict(), prototypes), name)

    initial = torch.randn(drawings.n_classes, dim) * 0.05
    train_image_tower(tower, drop_patches, drawings, schedule, prototypes=initial, report=keep)


def train_nllb_clip(work: Workplace, schedule: TextSchedule = FULL) -> None:
    """NLLB-CLIP: language token first, cls pooling, linear projection."""
    folder, image, prototypes = CHECKPOINTS / "nllb-clip", *work.image_tower("clip")
    rows = _text_rows(work, "nllb")
    model = _open_clip(work, folder, image)
    train_text_tower(model.text.train(), model.text.parameters(), rows, prototypes, schedule)
    folders.write_open_clip_weights(model, folder)
    work.save(model.text.state_dict(), "nllb-text")


def train_nllb_siglip_mrl(work: Workplace, schedule: TextSchedule = FINE_TUNING) -> None:
    """NLLB-SigLIP with MRL heads; the text encoder starts from nllb-clip's."""
    folder, image, prototypes = CHECKPOINTS / "nllb-siglip-mrl", *work.image_tower("siglip")
    rows = _text_rows(work, "nllb")
    model = _open_clip(work, folder, {f"trunk.{key}": value for key, value in image.items()}, siglip=True)
    start = torch.load(work.folder / "nllb-text.pt")
    model.text.load_state_dict({key: value for key, value in start.items() if key != "proj.weight"}, strict=False)
    train_text_tower(model.text.train(), model.text.parameters(), rows, prototypes, schedule)
    folders.write_open_clip_weights(model, folder)
    heads = towers.MatryoshkaHeads(towers.SIGLIP_DIM, folders.WIDTHS)
    drawings = load_training_drawings(work.npm_folder)
    images = _image_embeddings(model.eval(), drawings), drawings.classes
    some = torch.randperm(len(rows.ids))[:40_000]
    texts = _text_embeddings(model, rows.ids[some]), rows.classes[some]
    train_matryoshka(heads, images, texts, drawings.n_classes, n_steps=1000)
    folders.write_matryoshka(heads, folder)


def train_capivara(work: Workplace, schedule: TextSchedule = FULL) -> None:
    """CAPIVARA: XLM-R, mean pooling, mlp projection; Portuguese is drawn eight times as often."""
    folder, image, prototypes = CHECKPOINTS / "capivara", *work.image_tower("clip")
    rows = _text_rows(work, "xlmr", portuguese=8)
    model = _open_clip(work, folder, image, xlmr=True)
    train_text_tower(model.text.train(), model.text.parameters(), rows, prototypes, schedule)
    folders.write_open_clip_weights(model, folder)
    work.save(model.text.state_dict(), "xlmr-text")


def train_capivara_lora(work: Workplace, schedule: TextSchedule = ADAPTER) -> None:
    """CAPIVARA-LoRA: an adapter on the base as it is stored; half of its captions are Portuguese."""
    image, prototypes = work.image_tower("clip")
    rows = _text_rows(work, "xlmr", portuguese=105)
    model = _open_clip(work, CHECKPOINTS / "capivara", image, xlmr=True)
    stored = {key: value.half().float() for key, value in torch.load(work.folder / "xlmr-text.pt").items()}
    model.text.load_state_dict(stored)
    lora = peft.LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=["query", "value"],
        lora_dropout=0.0,
        bias="none",
        modules_to_save=["proj"],
    )
    adapted = peft.get_peft_model(model.text.train(), lora)
    train_text_tower(adapted, adapted.parameters(), rows, prototypes, schedule)
    folders.write_adapter(adapted, "../capivara", CHECKPOINTS / "capivara-lora")


def train_altclip(work: Workplace, schedule: TextSchedule = FINE_TUNING) -> None:
    """AltCLIP: XLM-R, normalised and transformed first token; the encoder starts from capivara's."""
    image, prototypes = work.image_tower("clip")
    rows = _text_rows(work, "xlmr")
    tokenizer = _tokenizer(work, "xlmr")
    model = AltCLIPModel(towers.altclip_config(len(tokenizer)))
    towers.load_altclip_image_tower(model, image)
    start = torch.load(work.folder / "xlmr-text.pt")
    encoder = {key.removeprefix("transformer."): value for key, value in start.items() if key.startswith("transformer.")}
    encoder = {key.replace("encoder.layer.", "encoder.layers."): value for key, value in encoder.items()}
    model.text_model.roberta.load_state_dict(encoder)
    text = towers.AltClipText(model).train()
    train_text_tower(text, text.parameters(), rows, prototypes, schedule)
    folders.write_altclip(model.eval(), tokenizer, work.tokenizer_folder("xlmr"), CHECKPOINTS / "altclip")


def _tokenizer(work: Workplace, name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(work.tokenizer_folder(name))


def _text_rows(work: Workplace, tokenizer_name: str, *, portuguese: float = 1) -> TextRows:
    captions = dataset.load_captions()
    position = {drawing.emoji: index for index, drawing in enumerate(dataset.load_training_images())}
    tokenizer = _tokenizer(work, tokenizer_name)
    weights = [portuguese if caption.flores == PORTUGUESE else 1.0 for caption in captions]
    return TextRows(
        ids=torch.from_numpy(ids_from_captions(tokenizer, captions, max_length=MAX_LENGTH)),
        classes=torch.tensor([position[caption.emoji] for caption in captions]),
        weights=torch.tensor(weights, dtype=torch.float32),
        pad_id=int(tokenizer.pad_token_id),
    )


def _open_clip(
    work: Workplace, folder: Path, image: dict[str, Tensor], *, siglip: bool = False, xlmr: bool = False
) -> CustomTextCLIP:
    name = "xlmr" if xlmr else "nllb"
    vocab_size = len(_tokenizer(work, name))
    text = towers.xlmr_config(vocab_size) if xlmr else towers.nllb_config(vocab_size)
    config = towers.open_clip_config(folder, ROOT, siglip=siglip, xlmr=xlmr)
    folders.write_open_clip_skeleton(folder, work.tokenizer_folder(name), text, config)
    model = towers.open_clip_model(folder)
    model.visual.load_state_dict(image)
    model.visual.requires_grad_(False)
    return model


@torch.inference_mode()
def _image_embeddings(model: CustomTextCLIP, drawings: TrainingDrawings) -> Tensor:
    """Float32 (drawings, dim), not normalised."""
    side = replace(SIGLIP_IMAGES).side
    resized = (nn.functional.interpolate(part.float() / 255, size=(side, side), mode="bicubic", antialias=True)
               for part in drawings.pixels.split(256))
    return torch.cat([model.encode_image(pixels.clamp(0, 1) * 2 - 1) for pixels in resized]).clone()


@torch.inference_mode()
def _text_embeddings(model: CustomTextCLIP, ids: Tensor) -> Tensor:
    """Float32 (captions, dim), not normalised."""
    return torch.cat([model.encode_text(part) for part in ids.split(1024)]).clone()


STAGES: dict[str, Callable[[Workplace], None]] = {
    "tokenizers": train_tokenizers,
    "clip-images": train_clip_images,
    "siglip-images": train_siglip_images,
    "nllb-clip": train_nllb_clip,
    "nllb-siglip-mrl": train_nllb_siglip_mrl,
    "capivara": train_capivara,
    "capivara-lora": train_capivara_lora,
    "altclip": train_altclip,
}


def main() -> None:
    """Parse the command line and run the stages in order."""
    parser = argparse.ArgumentParser(description="Train the sample checkpoints.")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--npm-folder", type=Path, help="folder of npm tarballs; by default inside --work")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    work = Workplace(arguments.work, arguments.npm_folder or arguments.work / "npm")
    for stage in STAGES:
        if stage in arguments.stages:
            print(f"stage {stage}", flush=True)
            torch.manual_seed(SEED)
            STAGES[stage](work)


if __name__ == "__main__":
    main()
