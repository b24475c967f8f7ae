"""Train the sample checkpoints on the sample data; takes about an hour of one core.

    python -m samples.train --work FOLDER [--stages STAGE ...]

Each stage saves its result in the work folder. A stage can be stopped at any time: the same command continues
it from the state that it saved at most a few minutes before, and passes over what is finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn
from transformers import AltCLIPModel, AutoTokenizer, PreTrainedTokenizerBase

from samples import dataset, folders, towers
from samples.curves import write_curves
from samples.image_stages import Workplace, train_clip_images, train_siglip_images, train_teacher
from samples.images import ClassBalancedSampler
from samples.texts import TextRows, TextSchedule, start_text_tower, train_matryoshka, train_text_tower
from samples.training import cpu_hours
from samples.vocabulary import ids_from_captions, write_nllb_tokenizer, write_xlmr_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "samples" / "checkpoints"
SEED = 20240
PORTUGUESE = "por_Latn"
MAX_LENGTH = 64  # longer than any caption
HEADS_DRAWINGS = 6  # of each emoji
HEADS_CAPTIONS = 25_000
HEADS_STEPS = 800

FULL = TextSchedule(16)
FULL_AGAIN = TextSchedule(10, learning_rate=1.2e-3)
FINE_TUNING = TextSchedule(6)
PORTUGUESE_TUNING = TextSchedule(0.5, learning_rate=7e-4)
ADAPTER = TextSchedule(0.7, learning_rate=3e-4)


def train_tokenizers(work: Workplace) -> None:
    """Train both tokenizers."""
    captions = dataset.load_captions()
    write_nllb_tokenizer(captions, work.tokenizer_folder("nllb"))
    write_xlmr_tokenizer(captions, work.tokenizer_folder("xlmr"))


def train_nllb_clip(work: Workplace) -> None:
    """Train NLLB-CLIP: language token first, cls pooling, linear projection."""
    folder, (image, prototypes) = CHECKPOINTS / "nllb-clip", work.image_tower("clip")
    model, rows = _open_clip(work, folder, image), _text_rows(work, "nllb")
    start_text_tower(model.text, model.text.transformer.embed_tokens.weight, rows, prototypes)
    train_text_tower(model.text, rows, prototypes, FULL, work.folder / "nllb")
    train_text_tower(model.text, rows, prototypes, FULL_AGAIN, work.folder / "nllb-again")
    work.save(model.text.state_dict(), "nllb-text")
    folders.write_open_clip_weights(model, folder)


def make_nllb_siglip_mrl(work: Workplace) -> None:
    """Build NLLB-SigLIP from its image tower and NLLB-CLIP's mapped text tower, and train its MRL heads."""
    folder = CHECKPOINTS / "nllb-siglip-mrl"
    image, _, lift = torch.load(work.folder / "siglip.pt")
    model = _open_clip(work, folder, _in_trunk(image), siglip=True).eval()
    text = torch.load(work.folder / "nllb-text.pt")
    model.text.load_state_dict({**text, "proj.weight": lift @ text["proj.weight"]})
    folders.write_open_clip_weights(model, folder)
    drawings, rows = work.data().drawings, _text_rows(work, "nllb")
    drawn = ClassBalancedSampler(drawings, work.settings.share_restyled).draw(
        HEADS_DRAWINGS * drawings.n_classes
    )
    some = torch.randperm(len(rows.ids))[:HEADS_CAPTIONS]
    some = some[(rows.ids[some] != rows.pad_id).sum(1).argsort()]
    heads = towers.MatryoshkaHeads(towers.SIGLIP_DIM, folders.WIDTHS)
    train_matryoshka(
        heads,
        (_image_embeddings(model, drawings.pixels[drawn]), drawings.classes[drawn]),
        (_text_embeddings(model, rows.ids[some], rows.pad_id), rows.classes[some]),
        drawings.n_classes,
        n_steps=HEADS_STEPS,
    )
    folders.write_matryoshka(heads, folder)


def train_capivara(work: Workplace) -> None:
    """Train CAPIVARA: XLM-R, mean pooling, mlp projection; at the end, every sixth caption is Portuguese."""
    folder, (image, prototypes) = CHECKPOINTS / "capivara", work.image_tower("clip")
    model, rows = _open_clip(work, folder, image, xlmr=True), _text_rows(work, "xlmr")
    start_text_tower(model.text, model.text.transformer.embeddings.word_embeddings.weight, rows, prototypes)
    train_text_tower(model.text, rows, prototypes, FULL, work.folder / "xlmr")
    train_text_tower(model.text, rows, prototypes, FULL_AGAIN, work.folder / "xlmr-again")
    work.save(model.text.state_dict(), "xlmr-text")
    weighted = _text_rows(work, "xlmr", portuguese=20)
    train_text_tower(model.text, weighted, prototypes, PORTUGUESE_TUNING, work.folder / "capivara")
    work.save(model.text.state_dict(), "capivara-text")
    folders.write_open_clip_weights(model, folder)


def train_capivara_lora(work: Workplace) -> None:
    """Train CAPIVARA-LoRA: an adapter on the stored (float16) base; half of its captions are Portuguese."""
    image, prototypes = work.image_tower("clip")
    rows = _text_rows(work, "xlmr", portuguese=105)
    model = _open_clip(work, CHECKPOINTS / "capivara", image, xlmr=True)
    text = torch.load(work.folder / "capivara-text.pt")
    model.text.load_state_dict({name: value.half().float() for name, value in text.items()})
    lora = peft.LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=["query", "value"],
        lora_dropout=0.0,
        bias="none",
        modules_to_save=["proj"],
    )
    adapted = peft.get_peft_model(model.text, lora)
    train_text_tower(adapted, rows, prototypes, ADAPTER, work.folder / "capivara-lora")
    folders.write_adapter(adapted, "../capivara", CHECKPOINTS / "capivara-lora")


def train_altclip(work: Workplace) -> None:
    """Train AltCLIP: XLM-R, normalised and transformed first token; initialised from capivara's encoder."""
    image, prototypes = work.image_tower("clip")
    tokenizer, rows = _tokenizer(work, "xlmr"), _text_rows(work, "xlmr")
    model = AltCLIPModel(towers.altclip_config(len(tokenizer)))
    towers.load_altclip_image_tower(model, image)
    encoder = {
        name.removeprefix("transformer.").replace("encoder.layer.", "encoder.layers."): value
        for name, value in torch.load(work.folder / "xlmr-text.pt").items()
        if name.startswith("transformer.")
    }
    model.text_model.roberta.load_state_dict(encoder)
    for linear in (model.text_model.transformation, model.text_projection):
        nn.init.xavier_uniform_(linear.weight)
    text = towers.AltClipText(model)
    train_text_tower(text, rows, prototypes, FINE_TUNING, work.folder / "altclip")
    train_text_tower(text, rows, prototypes, FINE_TUNING, work.folder / "altclip-again")
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


def _in_trunk(image: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a timm tower's weights for open_clip's wrapper."""
    return {f"trunk.{name}": value for name, value in image.items()}


@torch.no_grad()
def _image_embeddings(model: CustomTextCLIP, pixels: Tensor) -> Tensor:
    """Embed uint8 drawings to float32 (drawings, dim), not normalised."""
    return torch.cat([model.encode_image(part.float() / 255 * 2 - 1) for part in torch.split(pixels, 256)])


@torch.no_grad()
def _text_embeddings(model: CustomTextCLIP, ids: Tensor, pad_id: int) -> Tensor:
    """Embed captions, the shortest first, to float32 (captions, dim), not normalised."""
    parts = [part[:, : int((part != pad_id).sum(1).max())] for part in torch.split(ids, 1024)]
    return torch.cat([model.encode_text(part) for part in parts])


STAGES: dict[str, Callable[[Workplace], None]] = {
    "tokenizers": train_tokenizers,
    "teacher": train_teacher,
    "clip-images": train_clip_images,
    "siglip-images": train_siglip_images,
    "nllb-clip": train_nllb_clip,
    "nllb-siglip-mrl": make_nllb_siglip_mrl,
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
    parser.add_argument("--hold-out", help="design that the image towers do not see and are measured on")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the image stages' steps")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    npm_folder = arguments.npm_folder or arguments.work / "npm"
    work = Workplace(arguments.work, npm_folder, arguments.hold_out, arguments.steps)
    for stage in STAGES:
        if stage in arguments.stages:
            print(f"stage {stage}", flush=True)
            torch.manual_seed(SEED)
            STAGES[stage](work)
            print(f"{cpu_hours(work.folder):.2f} CPU hours in all", flush=True)
    if list(STAGES)[-1] in arguments.stages and work.held_out is None:
        write_curves(work.folder)


if __name__ == "__main__":
    main()
