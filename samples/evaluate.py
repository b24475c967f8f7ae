"""Measure the sample checkpoints on the held-out gallery, using only the families' own libraries.

    python -m samples.evaluate [CHECKPOINT ...]

For each language, the names of the emoji are the queries and the 1,911 held-out drawings the gallery. R@k is
the share of names whose emoji is among the k nearest drawings.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from samples import dataset

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "samples" / "checkpoints"
NAMES = ("nllb-clip", "nllb-siglip-mrl", "capivara", "capivara-lora", "altclip")
BATCH = 512
README_HEAD = (
    "# Sample checkpoints: measured figures",
    "",
    "Text → image on the held-out gallery (1,911 Twemoji drawings), mean over 106 languages, with the",
    "stored weights, through open_clip, peft and transformers alone. Chance is 0.0005 for R@1 and 0.005 for",
    "R@10. Written by `python -m samples.evaluate`; how they were made: [../README.md](../README.md).",
    "",
    "| checkpoint | R@1 | R@10 | Portuguese R@1 | worst language's R@1 | dim | parameters | size |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True, slots=True)
class Encoders:
    """Towers of a checkpoint with their preprocessing.

    Attributes:
        images: Function from drawings to float32 (drawings, dim), not necessarily normalised.
        texts: Function from names and their FLORES-200 language to float32 (names, dim).
        n_parameters: Number of parameters of both towers.
    """

    images: Callable[[Sequence[dataset.Drawing]], Tensor]
    texts: Callable[[Sequence[str], str], Tensor]
    n_parameters: int


def open_clip_encoders(folder: Path, adapter: Path | None = None) -> Encoders:
    """Load an open_clip folder; ``adapter`` is a peft folder on its text tower."""
    import open_clip

    name = f"local-dir:{folder.relative_to(ROOT).as_posix()}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    if adapter:
        import peft

        model.text = peft.PeftModel.from_pretrained(model.text, str(adapter))
    model.eval()
    pad_id = tokenizer.tokenizer.pad_token_id

    def images(drawings: Sequence[dataset.Drawing]) -> Tensor:
        return torch.as_tensor(model.encode_image(torch.stack([preprocess(one.image()) for one in drawings])))

    def texts(names: Sequence[str], flores: str) -> Tensor:
        if hasattr(tokenizer.tokenizer, "src_lang"):
            # Not open_clip's set_language: transformers 5 resets to src_lang at every call.
            tokenizer.tokenizer.src_lang = flores
        ids = tokenizer(list(names))
        longest = int((ids != pad_id).sum(1).max())
        return torch.as_tensor(model.encode_text(ids[:, :longest]))

    return Encoders(images, texts, n_parameters(model))


def altclip_encoders(folder: Path) -> Encoders:
    """Load a transformers AltCLIP folder."""
    from transformers import AltCLIPModel, AltCLIPProcessor

    model = AltCLIPModel.from_pretrained(folder).eval()
    processor = AltCLIPProcessor.from_pretrained(folder)

    def images(drawings: Sequence[dataset.Drawing]) -> Tensor:
        pixels = processor(images=[one.image() for one in drawings], return_tensors="pt")
        return torch.as_tensor(model.get_image_features(**pixels).pooler_output)

    def texts(names: Sequence[str], _: str) -> Tensor:
        tokens = processor(
            text=list(names), padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        return torch.as_tensor(model.get_text_features(**tokens).pooler_output)

    return Encoders(images, texts, n_parameters(model))


def encoders(name: str) -> Encoders:
    """Load a sample checkpoint by name."""
    if name == "altclip":
        return altclip_encoders(FOLDER / name)
    if name == "capivara-lora":
        return open_clip_encoders(FOLDER / "capivara", FOLDER / name)
    return open_clip_encoders(FOLDER / name)


def n_parameters(model: torch.nn.Module) -> int:
    """Count a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def matryoshka_heads(name: str) -> dict[int, tuple[Tensor, Tensor]]:
    """Load (weight, bias) of a checkpoint's MRL heads by width; empty without heads."""
    path = FOLDER / name / "model.safetensors"
    config = json.loads((FOLDER / name / "config.json").read_text()) if path.exists() else {}
    tensors = load_file(path) if "mrl_resolutions" in config else {}
    prefix = "matryoshka_layer.layers"
    return {
        width: (tensors[f"{prefix}.{width}.weight"].float(), tensors[f"{prefix}.{width}.bias"].float())
        for width in config.get("mrl_resolutions", [])
    }


@torch.inference_mode()
def evaluate(name: str) -> dict[str, Any]:
    """Measure one checkpoint; return the figures for ``figures.json``."""
    towers, heads, gallery = encoders(name), matryoshka_heads(name), dataset.load_gallery()
    position = {one.emoji: index for index, one in enumerate(gallery)}
    drawn = torch.cat(
        [towers.images(gallery[start : start + BATCH]) for start in range(0, len(gallery), BATCH)]
    )
    ranks: dict[str, Tensor] = {}
    narrow: dict[int, list[Tensor]] = {width: [] for width in heads}
    for flores in dataset.languages():
        captions = dataset.load_captions(flores)
        own = torch.tensor([position[caption.emoji] for caption in captions])
        written = towers.texts([caption.text for caption in captions], flores)
        ranks[flores] = rank_of_own(written, drawn, own)
        for width, (weight, bias) in heads.items():
            narrow[width].append(rank_of_own(written @ weight.T + bias, drawn @ weight.T + bias, own))
    worst = sorted(ranks, key=lambda flores: recall(ranks[flores], 1))[:5]
    size = sum(path.stat().st_size for path in (FOLDER / name).iterdir())
    figures: dict[str, Any] = {
        "recall_at_1": mean_recall(list(ranks.values()), 1),
        "recall_at_10": mean_recall(list(ranks.values()), 10),
        "n_languages": len(ranks),
        "n_gallery": len(gallery),
        "worst_languages_recall_at_1": {flores: recall(ranks[flores], 1) for flores in worst},
        "portuguese_recall_at_1": recall(ranks["por_Latn"], 1),
        "dim": drawn.shape[1],
        "n_parameters": towers.n_parameters,
        "size_bytes": size,
    }
    for width, found in narrow.items():
        figures[f"mrl_{width}_recall_at_1_and_10"] = [mean_recall(found, 1), mean_recall(found, 10)]
    return figures


def rank_of_own(texts: Tensor, images: Tensor, own: Tensor) -> Tensor:
    """Rank each text's own drawing by the number of nearer drawings, int64 (texts,)."""
    cosines = torch.nn.functional.normalize(texts, dim=1) @ torch.nn.functional.normalize(images, dim=1).T
    return (cosines > cosines.gather(1, own[:, None])).sum(1)


def recall(ranks: Tensor, k: int) -> float:
    """Compute the share of ranks below k."""
    return round(float((ranks < k).float().mean()), 4)


def mean_recall(ranks: Sequence[Tensor], k: int) -> float:
    """Compute recall at k, mean over languages."""
    return round(float(torch.stack([(one < k).float().mean() for one in ranks]).mean()), 4)


def record(name: str, figures: dict[str, Any]) -> None:
    """Update one checkpoint's figures in ``figures.json`` and ``README.md``."""
    path = FOLDER / "figures.json"
    known = {**(json.loads(path.read_text()) if path.exists() else {}), name: figures}
    known = {key: known[key] for key in NAMES if key in known}
    path.write_text(json.dumps(known, indent=2) + "\n")
    (FOLDER / "README.md").write_text(readme_from_figures(known))


def readme_from_figures(figures: dict[str, dict[str, Any]]) -> str:
    """Render the measured figures as a Markdown table."""
    lines = [*README_HEAD]
    for name, one in figures.items():
        flores, worst = next(iter(one["worst_languages_recall_at_1"].items()))
        lines.append(
            f"| `{name}` | {one['recall_at_1']:.3f} | {one['recall_at_10']:.3f} "
            f"| {one['portuguese_recall_at_1']:.3f} | {worst:.3f} ({flores}) | {one['dim']} "
            f"| {one['n_parameters'] / 1e6:.2f} M | {one['size_bytes'] / 1e6:.1f} MB |"
        )
    for name, one in figures.items():
        widths = {key.split("_")[1]: value for key, value in one.items() if key.startswith("mrl_")}
        heads = ", ".join(f"{width}: {first:.3f} / {ten:.3f}" for width, (first, ten) in widths.items())
        lines += ["", f"`{name}` through its MRL heads, R@1 / R@10 by width: {heads}."] if heads else []
    lines += ["", "`capivara-lora` counts the base's parameters with its own; its size is the adapter alone."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, print and record."""
    parser = argparse.ArgumentParser(description="Measure the sample checkpoints on the held-out gallery.")
    parser.add_argument(
        "checkpoints", nargs="*", metavar="CHECKPOINT", help=f"one of {', '.join(NAMES)}; all by default"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.chdir(ROOT)  # the samples' open_clip configurations refer to their text model relative to it
    for name in arguments.checkpoints or NAMES:
        figures = evaluate(name)
        print(f"{name}: {json.dumps(figures)}", flush=True)
        record(name, figures)


if __name__ == "__main__":
    main()
