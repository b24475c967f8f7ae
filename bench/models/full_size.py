"""Published variants with random weights at their true size, and tasks in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.models.gemma_tokenizer import write_gemma_tokenizer
from bench.models.samples import CHECKPOINTS
from export.families.published import TEXT_CONFIGS, VARIANTS
from runtime.errors import BabeltowerError
from runtime.machine import peak_memory_bytes

__all__ = ["checkpoint_from_variant", "in_process"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
)


def checkpoint_from_variant(
    name: str, folder: Path, *, samples: Path = CHECKPOINTS, seed: int = 0
) -> Path | None:
    """Write a published variant with random weights in its published format.

    Returns:
        The open_clip folder of its image tower, inside ``folder``, if the variant holds none.

    Raises:
        BabeltowerError: no such variant.
    """
    import torch

    if name not in VARIANTS:
        raise BabeltowerError(f"{name!r} is not a published variant; known are {list(VARIANTS)}.")
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    facts = VARIANTS[name]
    if "m_clip" in facts:
        return _write_m_clip(str(facts["m_clip"]), folder, samples)
    if "altclip" in facts:
        _write_altclip(facts["altclip"], folder, samples)
    elif "siglip2" in facts:
        _write_siglip2(facts["siglip2"], folder)
    elif "metaclip2" in facts:
        _write_metaclip2(facts["metaclip2"], folder, samples)
    elif "SigLIP2" in facts["open_clip"]:
        _write_open_clip_siglip2(str(facts["open_clip"]), folder)
    else:
        _write_open_clip(facts, folder, samples)
    return None


def in_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in a fresh process; return its result and the process's peak memory in bytes."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, task, arguments))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise BabeltowerError(
            f"{task.__name__}{arguments} died with exit code {process.exitcode}: out of memory is likely."
        ) from None
    process.join()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _child(sender: Any, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = task(*arguments)
        peak_bytes = peak_memory_bytes()
        sender.send((result, peak_bytes))
    except BabeltowerError as error:
        sender.send(error)


def _write_open_clip(facts: Mapping[str, Any], folder: Path, samples: Path) -> None:
    from safetensors.torch import save_file

    from export.families.open_clip_checkpoint import architecture_config, model_from_config, text_config_of

    config = architecture_config(facts["open_clip"])
    text_config = text_config_of(folder, str(config["text_cfg"]["hf_model_name"]))
    model = model_from_config(config, text_config)
    siglip = "timm_model_name" in config["vision_cfg"]
    half, squash = [0.5] * 3, {"interpolation": "bicubic", "resize_mode": "squash"}
    preprocess = {"mean": half, "std": half, **squash} if siglip else {}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _copy_tokenizer(samples / ("nllb-clip" if text_config["model_type"] == "m2m_100" else "capivara"), folder)
    if mrl_dims := facts.get("mrl_dims"):
        import torch

        dim = int(config["embed_dim"])
        heads = {r: torch.nn.Linear(dim, r) for r in mrl_dims}
        state = {f"model.{name}": tensor for name, tensor in state.items()}
        for r, head in heads.items():
            state |= {f"matryoshka_layer.layers.{r}.{k}": v.detach() for k, v in head.state_dict().items()}
        mrl = {
            "clip_model_name": facts["open_clip"],
            "mrl_resolutions": list(mrl_dims),
            "target_resolution": dim,
            "preprocess_cfg": {"size": config["vision_cfg"]["image_size"], **preprocess},
        }
        _write_json(folder / "config.json", mrl)
        save_file(state, folder / "model.safetensors")
        return
    _write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    save_file(state, folder / "open_clip_model.safetensors")


def _write_altclip(config: Mapping[str, Any], folder: Path, samples: Path) -> None:
    from transformers import AltCLIPConfig, AltCLIPModel

    AltCLIPModel(AltCLIPConfig.from_dict(dict(config))).save_pretrained(folder)
    _copy_tokenizer(samples / "altclip", folder)
    preprocessor = json.loads((samples / "altclip" / "preprocessor_config.json").read_text())
    size = config["vision_config"]["image_size"]
    preprocessor |= {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    _write_json(folder / "preprocessor_config.json", preprocessor)


def _write_m_clip(image: str, folder: Path, samples: Path) -> Path:
    """Write the text tower, and an open_clip folder with the image tower's weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import XLMRobertaConfig, XLMRobertaModel

    from export.families.open_clip_checkpoint import architecture_config
    from export.families.open_clip_images import visual_from_config

    config = architecture_config(image)
    text = {k: v for k, v in TEXT_CONFIGS["xlm-roberta-large"].items() if k != "model_type"}
    transformer = XLMRobertaModel(XLMRobertaConfig(**text))
    linear = torch.nn.Linear(text["hidden_size"], config["embed_dim"])
    state = {f"transformer.{name}": tensor for name, tensor in transformer.state_dict().items()}
    state |= {f"LinearTransformation.{name}": tensor.detach() for name, tensor in linear.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    published = {
        "model_type": "M-CLIP",
        "modelBase": "xlm-roberta-large",
        "transformerDimensions": text["hidden_size"],
        "numDims": config["embed_dim"],
    }
    _write_json(folder / "config.json", published)
    _copy_tokenizer(samples / "capivara", folder)
    tower = folder / "image_tower"
    tower.mkdir()
    visual = visual_from_config(config, tower)
    _write_json(tower / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    weights = {f"visual.{name}": tensor.contiguous() for name, tensor in visual.state_dict().items()}
    save_file(weights, tower / "open_clip_model.safetensors")
    return tower


def _write_siglip2(config: Mapping[str, Any], folder: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    SiglipModel(SiglipConfig.from_dict(dict(config))).save_pretrained(folder)
    write_gemma_tokenizer(folder)
    side = config["vision_config"]["image_size"]
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": None,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
        "size": {"height": side, "width": side},
    }
    _write_json(folder / "preprocessor_config.json", preprocessor)


def _write_open_clip_siglip2(name: str, folder: Path) -> None:
    from safetensors.torch import save_file

    from export.families.open_clip_checkpoint import architecture_config, model_from_config

    config = architecture_config(name)
    state = model_from_config(config, {}).state_dict()
    preprocess = {
        "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    _write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    weights = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    write_gemma_tokenizer(folder)


def _write_metaclip2(config: Mapping[str, Any], folder: Path, samples: Path) -> None:
    from transformers import MetaClip2Config, MetaClip2Model

    MetaClip2Model(MetaClip2Config.from_dict(dict(config))).save_pretrained(folder)
    _copy_tokenizer(samples / "capivara", folder)
    shutil.copy(samples / "altclip" / "preprocessor_config.json", folder)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    size = config["vision_config"]["image_size"]
    preprocessor |= {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    _write_json(folder / "preprocessor_config.json", preprocessor)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
