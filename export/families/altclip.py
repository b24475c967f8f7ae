"""AltCLIP (arXiv 2211.06679): transformers folders, XLM-R large and a CLIP image tower; m9 and m18 too."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from export.encoders import roberta_encoder_from_transformers
from export.families.family import Family, LoadOptions
from export.fingerprints import embedding_space_fingerprint
from export.image_encoders import ClipVisionEncoder
from export.licences import licence_of_folder
from export.published import LICENCES, XLM_R_LANGUAGES
from export.references import AltClipReference
from export.tokenizers import TOKENIZER_FILES, has_tokenizer, preprocessing_from_tokenizer, tokenizer_json
from export.towers import ImageTower, MrlHeads, TextTower, Towers
from export.weights import config_from_file, state_dict_from_file
from runtime.errors import CheckpointError
from runtime.manifest import ImagePreprocessing, triple

__all__ = ["FAMILY"]

CONTEXT_LENGTH = 77
"""Of the authors' code; the tokenizer alone would take 512."""

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PIL_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class AltPool(nn.Module):
    """pre_LN → transformation → token 0 → text_projection: (batch, tokens, width) → (batch, dim)."""

    def __init__(self, text_model: Any, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.transformation = text_model.pre_LN, text_model.transformation
        self.projection = projection

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """All but token 0 is dropped first: the layers between act on each token alone."""
        return cast("Tensor", self.projection(self.transformation(self.norm(hidden[:, 0]))))


def claims(path: Path) -> bool:
    """A transformers folder of model type altclip."""
    config = path / "config.json"
    return config.is_file() and config_from_file(config).get("model_type") == "altclip"


def load(path: Path, options: LoadOptions) -> Towers:
    """Read both towers.

    Raises:
        CheckpointError: a missing or unreadable file, weights that do not fill the architecture, or a
            preprocessing that CLIP's image processor does not have.
    """
    model = _model(path)
    tokenizer, image_processor = _processors(path)
    context_length = options.context_length or CONTEXT_LENGTH
    encoder = roberta_encoder_from_transformers(model.text_model.roberta)
    text_preprocessing = preprocessing_from_tokenizer(
        tokenizer, n_tokens=encoder.tokens.num_embeddings, context_length=context_length, clean="none"
    )
    image_preprocessing = _image_preprocessing(path)
    serialised = tokenizer_json(tokenizer)
    heads = MrlHeads({})
    text_tower = TextTower(encoder, AltPool(model.text_model, model.text_projection), heads).eval()
    image_tower = ImageTower(
        ClipVisionEncoder(model.vision_model, model.visual_projection),
        heads,
        mean=image_preprocessing.mean,
        std=image_preprocessing.std,
    ).eval()
    reference = AltClipReference(
        tokenizer=tokenizer, image_processor=image_processor, model=model, context_length=context_length
    )
    return Towers(
        family="altclip",
        architecture=_architecture(model.config),
        licence=licence_of_folder(path, "altclip"),
        dim=int(model.config.projection_dim),
        text=text_tower,
        image=image_tower,
        tokenizer_json=serialised,
        text_preprocessing=text_preprocessing,
        image_preprocessing=image_preprocessing,
        languages=XLM_R_LANGUAGES,
        reference=reference,
        fingerprint=embedding_space_fingerprint(
            text_tower,
            image_tower,
            tokenizer_json=serialised,
            text_preprocessing=text_preprocessing,
            image_preprocessing=image_preprocessing,
            reference=reference,
        ),
        source={"weights": next(name for name in _WEIGHT_FILES if (path / name).is_file())},
    )


def _model(path: Path) -> Any:
    import torch
    from transformers import AltCLIPModel
    from transformers.utils import logging as transformers_logging

    weights = next((path / name for name in _WEIGHT_FILES if (path / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{path} holds no weights; expected one of {list(_WEIGHT_FILES)}. Copy the folder again, whole."
        )
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)  # its report of faults is repeated below as an error
    transformers_logging.disable_progress_bar()
    try:
        model, info = AltCLIPModel.from_pretrained(
            str(path),
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            weights_only=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        if weights.suffix != ".json":
            state_dict_from_file(weights)  # says which file is cut short or corrupt, and why
        raise CheckpointError(
            f"transformers cannot load {path}: {str(error).strip().splitlines()[0]}. "
            "Its config.json or weights are damaged, or of another transformers version."
        ) from error
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
    _check_loading(info, weights)
    return model.eval().requires_grad_(False)


def _check_loading(info: dict[str, Any], weights: Path) -> None:
    obsolete = ("position_ids", "token_type_ids", "text_model.roberta.pooler.")
    faults = [f"{name} is missing" for name in info["missing_keys"]]
    faults += [
        f"{name} is unexpected" for name in info["unexpected_keys"] if not any(x in name for x in obsolete)
    ]
    faults += [f"{fault} has another shape" for fault in info["mismatched_keys"]]
    if faults:
        raise CheckpointError(
            f"{weights} does not fit its architecture: {'; '.join(sorted(faults)[:4])}; {len(faults)} faults "
            "in all. The config.json beside it belongs to another checkpoint, or the file to another model."
        )


def _processors(path: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoTokenizer

    if not has_tokenizer(path):  # transformers would make an empty one up
        raise CheckpointError(
            f"{path} has no usable tokenizer: none of {list(TOKENIZER_FILES)} is there. "
            "Copy the checkpoint folder again, whole."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        # PIL's resize is what the checkpoints were trained with; torchvision's differs in the last bit.
        image_processor = AutoImageProcessor.from_pretrained(str(path), backend="pil", local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"{path} has no usable tokenizer or preprocessor_config.json "
            f"({str(error).strip().splitlines()[0]}). Copy the checkpoint folder again, whole."
        ) from error
    return tokenizer, image_processor


def _image_preprocessing(path: Path) -> ImagePreprocessing:
    config = config_from_file(path / "preprocessor_config.json")
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    side = size.get("shortest_edge") if isinstance(size, dict) else size
    height, width = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    steps = {
        step: config.get(step, True)
        for step in ("do_resize", "do_center_crop", "do_normalize", "do_convert_rgb")
    }
    if (
        not all(steps.values())
        or side != height
        or height != width
        or config.get("resample", 3) not in _PIL_RESAMPLING
    ):
        raise CheckpointError(
            f"{path / 'preprocessor_config.json'} asks for a preprocessing that is not CLIP's (resize of the "
            f"shortest side to the crop's size, centre crop, RGB, normalise): {config}."
        )
    return ImagePreprocessing(
        height=int(height),
        width=int(width),
        resize="shortest",
        interpolation=_PIL_RESAMPLING[config.get("resample", 3)],
        order="convert-resize",
        crop_rounding="floor",
        mean=triple(config["image_mean"]),
        std=triple(config["image_std"]),
    )


def _architecture(config: Any) -> str:
    text, vision = config.text_config, config.vision_config
    return (
        f"XLM-R {text.hidden_size}x{text.num_hidden_layers} + "
        f"ViT {vision.hidden_size}x{vision.num_hidden_layers}/{vision.patch_size}"
    )


FAMILY = Family(
    name="altclip",
    claims=claims,
    load=load,
    licence=LICENCES["altclip"],
    forms="transformers AltCLIPModel folder (AltCLIP, m9, m18)",
)
