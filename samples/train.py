"""Train the sample checkpoints from the sample data; tens of minutes on two cores.

    python -m samples.train --work FOLDER [--stages STAGE ...]

Each stage leaves its result in the work folder, so a stage can be run again by itself.
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
from samples.image_stages import Workplace, distil_siglip_images, train_clip_images, train_siglip_images
from samples.images import TrainingDrawings, load_training_drawings
from samples.texts import (
    TextRows,
    TextSchedule,
    fit_projection,
    nllb_bag,
    start_as_mean,
    train_matryoshka,
    train_text_tower,
    vectors_from_prototypes,
    xlmr_bag,
)
from samples.vocabulary import ids_from_captions, write_nllb_tokenizer, write_xlmr_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "samples" / "checkpoints"
SEED = 20240
PORTUGUESE = "por_Latn"
MAX_LENGTH = 64  # longer than any caption

BAG = TextSchedule(2400, batch=1024, learning_rate=4e-3)
FULL = TextSchedule(1200, learning_rate=1e-3)
NLLB_FULL = TextSchedule(1200, learning_rate=2e-3, vocabulary_speed=0.3)
FINE_TUNING = TextSchedule(600, learning_rate=1e-3)
NLLB_FINE_TUNING = TextSchedule(600, learning_rate=1e-3, vocabulary_speed=0.3)
ADAPTER = TextSchedule(250, learning_rate=1e-3)


def train_tokenizers(work: Workplace) -> None:
    """Train both tokenizers."""
    captions = dataset.load_captions()
    write_nllb_tokenizer(captions, work.tokenizer_folder("nllb"))
    write_xlmr_tokenizer(captions, work.tokenizer_folder("xlmr"))


def train_nllb_siglip_text(work: Workplace) -> None:
    """NLLB-SigLIP's text tower: language token first, cls pooling, linear projection."""
    folder, (image, prototypes) = CHECKPOINTS / "nllb-siglip-mrl", work.image_tower("siglip-start")
    model = _open_clip(work, folder, _in_trunk(image), siglip=True)
    rows = _text_rows(work, "nllb")
    start_as_fairseq(model.text.transformer)
    vocabulary = model.text.transformer.embed_tokens.weight
    _set_vectors(vocabulary, vectors_from_prototypes(rows, prototypes, len(vocabulary)), 1.0)
    first, last = model.text.transformer.layers
    attention = first.self_attn
    named = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
    start_as_mean(
        {**named, "output": attention.out_proj}, [first.fc2, last.fc2, last.self_attn.out_proj], strength=4
    )
    train_text_tower(nllb_bag(model.text), model.text.parameters(), rows, prototypes, BAG)
    work.save(model.text.state_dict(), "nllb-bag")
    train_text_tower(model.text.train(), model.text.parameters(), rows, prototypes, NLLB_FULL)
    folders.write_open_clip_weights(model, folder)
    work.save(model.text.state_dict(), "nllb-text")


def start_as_fairseq(encoder: nn.Module) -> None:
    """Start an NLLB encoder as fairseq does.

    transformers starts all weights so small that, at this width, the fixed positions drown the tokens and
    little of them reaches the language token, which alone is pooled.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3 * module.embedding_dim**-0.5)


def train_nllb_siglip_mrl(work: Workplace) -> None:
    """NLLB-SigLIP with its final image tower, and MRL heads on finished embeddings."""
    folder, (image, _) = CHECKPOINTS / "nllb-siglip-mrl", work.image_tower("siglip")
    model = _open_clip(work, folder, _in_trunk(image), siglip=True).eval()
    model.text.load_state_dict(torch.load(work.folder / "nllb-text.pt"))
    folders.write_open_clip_weights(model, folder)
    drawings, rows = load_training_drawings(work.npm_folder), _text_rows(work, "nllb")
    some = torch.randperm(len(rows.ids))[:40_000]
    heads = towers.MatryoshkaHeads(towers.SIGLIP_DIM, folders.WIDTHS)
    train_matryoshka(
        heads,
        (_image_embeddings(model, drawings), drawings.classes),
        (_text_embeddings(model, rows.ids[some]), rows.classes[some]),
        drawings.n_classes,
        n_steps=1000,
    )
    folders.write_matryoshka(heads, folder)


def train_nllb_clip(work: Workplace) -> None:
    """NLLB-CLIP: the text encoder starts from NLLB-SigLIP's, the projection from nothing."""
    folder, (image, prototypes) = CHECKPOINTS / "nllb-clip", work.image_tower("clip")
    model = _open_clip(work, folder, image)
    start = torch.load(work.folder / "nllb-text.pt")
    del start["proj.weight"]
    model.text.load_state_dict(start, strict=False)
    rows = _text_rows(work, "nllb")
    some = torch.randperm(len(rows.ids))[:20_000]
    model.text.proj = nn.Identity()
    features = _text_embeddings(model.eval(), rows.ids[some])
    model.text.proj = nn.Linear(features.shape[1], towers.DIM, bias=False)
    fit_projection(model.text.proj, features, prototypes[rows.classes[some]])
    train_text_tower(model.text.train(), model.text.parameters(), rows, prototypes, NLLB_FINE_TUNING)
    folders.write_open_clip_weights(model, folder)


def train_capivara(work: Workplace) -> None:
    """CAPIVARA: XLM-R, mean pooling, mlp projection; Portuguese is drawn eight times as often."""
    folder, (image, prototypes) = CHECKPOINTS / "capivara", work.image_tower("clip")
    rows = _text_rows(work, "xlmr", portuguese=8)
    model = _open_clip(work, folder, image, xlmr=True)
    vocabulary = model.text.transformer.embeddings.word_embeddings.weight
    _set_vectors(vocabulary, vectors_from_prototypes(rows, prototypes, len(vocabulary)), 2.0)
    first, last = model.text.transformer.encoder.layer
    named = {name: getattr(first.attention.self, name) for name in ("query", "key", "value")}
    quiet = [first.output.dense, last.output.dense, last.attention.output.dense]
    start_as_mean({**named, "output": first.attention.output.dense}, quiet, strength=1)
    train_text_tower(xlmr_bag(model.text), model.text.parameters(), rows, prototypes, BAG)
    work.save(model.text.state_dict(), "xlmr-bag")
    train_text_tower(model.text.train(), model.text.parameters(), rows, prototypes, FULL)
    folders.write_open_clip_weights(model, folder)
    work.save(model.text.state_dict(), "xlmr-text")


def train_capivara_lora(work: Workplace) -> None:
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
    train_text_tower(adapted, adapted.parameters(), rows, prototypes, ADAPTER)
    folders.write_adapter(adapted, "../capivara", CHECKPOINTS / "capivara-lora")


def train_altclip(work: Workplace) -> None:
    """AltCLIP: XLM-R, normalised and transformed first token; the encoder starts from capivara's."""
    image, prototypes = work.image_tower("clip")
    rows = _text_rows(work, "xlmr")
    tokenizer = _tokenizer(work, "xlmr")
    model = AltCLIPModel(towers.altclip_config(len(tokenizer)))
    towers.load_altclip_image_tower(model, image)
    start = torch.load(work.folder / "xlmr-text.pt")
    encoder = {
        key.removeprefix("transformer."): value
        for key, value in start.items()
        if key.startswith("transformer.")
    }
    encoder = {key.replace("encoder.layer.", "encoder.layers."): value for key, value in encoder.items()}
    model.text_model.roberta.load_state_dict(encoder)
    text = towers.AltClipText(model).train()
    train_text_tower(text, text.parameters(), rows, prototypes, FINE_TUNING)
    folders.write_altclip(model.eval(), tokenizer, work.tokenizer_folder("xlmr"), CHECKPOINTS / "altclip")


@torch.no_grad()
def _set_vectors(vocabulary: Tensor, vectors: Tensor, scale: float) -> None:
    """Add starting vectors to a table of random ones, which may be wider."""
    vocabulary[:, : vectors.shape[1]] += scale * vectors


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
    """Names of a timm tower's weights as open_clip's wrapper has them."""
    return {f"trunk.{name}": value for name, value in image.items()}


@torch.no_grad()
def _image_embeddings(model: CustomTextCLIP, drawings: TrainingDrawings) -> Tensor:
    """Float32 (drawings, dim), not normalised."""
    size = (towers.SIGLIP_SIDE, towers.SIGLIP_SIDE)
    embeddings = []
    for part in torch.split(drawings.pixels, 256):
        pixels = nn.functional.interpolate(part.float() / 255, size=size, mode="bicubic", antialias=True)
        embeddings.append(model.encode_image(pixels.clamp(0, 1) * 2 - 1))
    return torch.cat(embeddings)


@torch.no_grad()
def _text_embeddings(model: CustomTextCLIP, ids: Tensor) -> Tensor:
    """Float32 (captions, dim), not normalised."""
    return torch.cat([model.encode_text(part) for part in torch.split(ids, 1024)])


STAGES: dict[str, Callable[[Workplace], None]] = {
    "tokenizers": train_tokenizers,
    "clip-images": train_clip_images,
    "siglip-images": train_siglip_images,
    "siglip-distilled": distil_siglip_images,
    "nllb-siglip-text": train_nllb_siglip_text,
    "nllb-siglip-mrl": train_nllb_siglip_mrl,
    "nllb-clip": train_nllb_clip,
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
