"""Layout of immich's machine-learning service: ``CACHE/clip/NAME`` with ``textual`` and ``visual``.

The service knows its models by name, and treats one whose name begins with ``nllb`` as a model with
languages: it puts a FLORES-200 code before the text, as a string. It pads every text to the context length,
gives no mask, normalises images itself, and takes the first output's only row.

Source:
    ``machine-learning`` of immich, its releases and its main branch of late 2026, read for the facts only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
from tokenizers import AddedToken
from tokenizers import Tokenizer as Subwords
from tokenizers.processors import TemplateProcessing

from export.graphs.edits import drop_unused
from export.graphs.files import save_graph
from export.graphs.normalised_images import take_normalised_images
from export.graphs.padded_texts import LanguageTokens, take_padded_texts
from export.layouts.cleaning_rules import add_cleaning
from export.layouts.immich_model import CODES_OF_IMMICH, ImmichModel
from export.layouts.layout import Layout, LayoutRequest, ModelPlace
from export.layouts.names import LayoutName
from export.towers import Towers
from runtime.errors import ExportError
from runtime.immich_names import KNOWN_MODELS, name_of_architecture
from runtime.manifest import TOKENIZER_FILE, Engine, Modality, TextPreprocessing

__all__ = ["IMMICH", "tokenizer_with_languages"]

_WITH_LANGUAGES = "nllb"
"""Beginning of the names whose texts come with a language."""

_DEFAULT_LANGUAGE = "eng_Latn"
"""Code that the service passes for a language that it does not know."""

_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"


def _place(towers: Towers, name: str | None) -> ModelPlace:
    found = name or name_of_architecture(
        towers.architecture, dim=towers.dim, has_mrl_heads=bool(towers.mrl_dims)
    )
    if found is None:
        raise ExportError(
            f"immich has no model of this architecture ({towers.architecture}, {towers.dim} wide), and so no "
            f"name for this checkpoint. Pass --name with one that it knows, whose place the model takes: "
            f"{_known(towers)}."
        )
    if found not in KNOWN_MODELS:
        raise ExportError(
            f"immich loads no model named {found!r}. Pass --name with one that it knows, whose place the "
            f"model takes: {_known(towers)}."
        )
    has_languages = towers.text_preprocessing.needs_language
    if found.startswith(_WITH_LANGUAGES) is not has_languages:
        raise ExportError(
            f"immich puts a language code before the texts of models whose name begins with "
            f"{_WITH_LANGUAGES!r}, and of no other; this text tower has "
            f"{'language tokens' if has_languages else 'no language tokens'}, so {found!r} does not fit. "
            f"Pass --name with one of: {_known(towers)}."
        )
    return ModelPlace(found, Path("clip") / found, tuple(_notes(towers, found)))


def _known(towers: Towers) -> str:
    """Names that fit a tower's languages, those of its width first."""
    fitting = [
        name
        for name in KNOWN_MODELS
        if name.startswith(_WITH_LANGUAGES) is towers.text_preprocessing.needs_language
    ]
    return ", ".join(sorted(fitting, key=lambda name: KNOWN_MODELS[name] != towers.dim))


def _notes(towers: Towers, name: str) -> list[str]:
    notes = []
    if KNOWN_MODELS[name] != towers.dim:
        notes.append(
            f"immich's database expects {KNOWN_MODELS[name]}-wide vectors under this name; these are "
            f"{towers.dim} wide. Its machine-learning service loads the model, but its server cannot store "
            "the vectors."
        )
    if towers.image_preprocessing.resize == "squash":
        notes.append(
            "This image tower squashes images to a square. Releases of immich that do not read resize_mode "
            "crop them instead, for their own model of this name too."
        )
    return notes


def _write(request: LayoutRequest) -> tuple[str, ...]:
    """Write the model's folder; there are no further notes.

    Raises:
        ExportError: the service cannot prepare this checkpoint's inputs.
    """
    towers, folder = request.towers, request.folder
    text, image = towers.text_preprocessing, towers.image_preprocessing
    if image.height != image.width:
        raise ExportError(
            f"immich resizes images to squares; this image tower takes {image.width}×{image.height}."
        )
    tokenizer = tokenizer_with_languages(towers.tokenizer_json, text)
    for part in Modality:
        model = onnx_ir.load(request.graphs[part])
        del model.graph.outputs[1:]  # MRL heads: the service reads the first output
        if part is Modality.TEXT:
            take_padded_texts(
                model,
                name="text",
                pad_id=text.pad_id,
                context_length=text.context_length,
                languages=_language_tokens(text, tokenizer.second_ids),
            )
        else:
            take_normalised_images(model, name="image", mean=image.mean, std=image.std)
        drop_unused(model)
        model.metadata_props["babeltower.layout"] = LayoutName.IMMICH.value
        save_graph(model, folder / _PARTS[part] / _GRAPH, data_name=_WEIGHTS)
    textual, visual = (folder / _PARTS[part] for part in (Modality.TEXT, Modality.IMAGE))
    (textual / TOKENIZER_FILE).write_text(tokenizer.file, encoding="utf-8")
    _write_json(
        textual / "tokenizer_config.json",
        {"pad_token": tokenizer.pad_token, "model_max_length": text.context_length},
    )
    _write_json(
        visual / "preprocess_cfg.json",
        {
            "size": [image.height, image.width],
            "mode": "RGB",
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": image.interpolation,
            "resize_mode": image.resize,
            "fill_color": 0,
        },
    )
    _write_json(
        folder / "config.json",
        {
            "embed_dim": towers.dim,
            "vision_cfg": {"image_size": image.height},
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": towers.n_tokens,
                "tokenizer_kwargs": {"clean": "whitespace"},
            },
        },
    )
    return ()


_PARTS = {Modality.TEXT: "textual", Modality.IMAGE: "visual"}


def _language_tokens(text: TextPreprocessing, second_ids: Mapping[int, int]) -> LanguageTokens | None:
    if not text.needs_language:
        return None
    if _DEFAULT_LANGUAGE not in text.language_ids:
        raise ExportError(
            f"immich passes {_DEFAULT_LANGUAGE} for languages that it does not know, and this text tower has "
            "no such language. Keep it in the vocabulary."
        )
    known = sorted(set(text.language_ids.values()))
    return LanguageTokens(text.language_ids[_DEFAULT_LANGUAGE], known, second_ids)


@dataclass(frozen=True, slots=True)
class LayoutTokenizer:
    """Text of a ``tokenizers`` file, its padding token, and second ids of language tokens by themselves."""

    file: str
    pad_token: str
    second_ids: Mapping[int, int]


def tokenizer_with_languages(tokenizer_json: str, text: TextPreprocessing) -> LayoutTokenizer:
    """Add cleaning, special tokens and the service's codes to a tower's tokenizer.

    The service passes "por_Latn" + text as one string. Texts of a tower without languages get its prefix;
    both kinds get the suffix. The codes that the service passes and FLORES-200 lacks become tokens of their
    own, which the graph takes for the language's.
    """
    subwords = Subwords.from_str(tokenizer_json)
    if text.clean == "whitespace":
        add_cleaning(subwords)
    passed = {
        code: CODES_OF_IMMICH[code]
        for code in text.language_ids
        if code in CODES_OF_IMMICH and CODES_OF_IMMICH[code] not in text.language_ids
    }
    subwords.add_special_tokens(
        [AddedToken(code, special=True, normalized=False) for code in passed.values()]
    )
    ids = subwords.get_vocab()
    second_ids = {ids[other]: text.language_ids[code] for code, other in passed.items()}
    prefix, suffix = ([_token(subwords, i) for i in ids] for ids in (text.prefix_ids, text.suffix_ids))
    subwords.post_processor = TemplateProcessing(
        single=[*prefix, "$A", *suffix],
        pair=[*prefix, "$A", *suffix, "$B", *suffix],
        special_tokens=[(token, subwords.token_to_id(token)) for token in dict.fromkeys([*prefix, *suffix])],
    )
    return LayoutTokenizer(subwords.to_str(), _token(subwords, text.pad_id), second_ids)


def _token(subwords: Subwords, token_id: int) -> str:
    token = subwords.id_to_token(token_id)
    if token is None or subwords.token_to_id(token) != token_id:
        raise ExportError(f"The tokenizer has no token of id {token_id}, which surrounds or pads its texts.")
    return str(token)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _open(request: LayoutRequest) -> ImmichModel:
    return ImmichModel(request.folder, request.place, precision=request.precision, threads=request.threads)


IMMICH = Layout(LayoutName.IMMICH, Engine.ONNXRUNTIME, _place, _write, _open)
