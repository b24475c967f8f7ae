"""Babel-ImageNet: names of ImageNet's classes in up to 298 languages, with translated prompts in 90.

As in the published evaluation, each language has only the classes that it names, with ImageNet's validation
images of those, and English uses OpenAI's labels and prompts instead of the file's. Labels and prompts are
kept unchanged: two classes may share a name, and prompts may contain double spaces.

Source: github.com/gregor-ge/Babel-ImageNet, ``benchmark/data/babel_imagenet.py`` (arXiv 2306.08658).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.datasets.class_sets import ClassificationSet, ClassNames, Prompts
from bench.datasets.imagenet import IMAGENET_LAYOUT, imagenet_images
from bench.datasets.language_maps import LanguageMap, babel_language
from bench.datasets.lines import json_from_text, text_of
from runtime.errors import DatasetError

__all__ = ["BABEL_IMAGENET_LAYOUT", "read_babel_imagenet"]

BABEL_IMAGENET_LAYOUT = f"""\
    FOLDER/babel_imagenet-298.json     {{"DE": [[0, 1, …], ["Schleie", …]], …}}; or babel_imagenet.json
    FOLDER/nllb_dist13b_prompts.json   {{"DE": ["ein Foto von einem {{}}", …], …}}; without it, labels alone
{IMAGENET_LAYOUT}"""

_FILES = ("babel_imagenet-298.json", "babel_imagenet.json")
_N_CLASSES = 1000
_N_IMAGES = 50_000
_ENGLISH = "EN"


def read_babel_imagenet(folder: Path, language_map: LanguageMap) -> ClassificationSet:
    """Read Babel-ImageNet with ImageNet's validation images.

    Raises:
        DatasetError: a file is missing or malformed.
    """
    path = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[0])
    data = _object(path)
    prompts_path = folder / "nllb_dist13b_prompts.json"
    prompts = _object(prompts_path) if prompts_path.is_file() else {}
    languages = [
        _names(path, code, entry, prompts.get(code, []), language_map) for code, entry in data.items()
    ]
    images, class_of = imagenet_images(folder)
    notes = [
        f"Babel-ImageNet: {path.name}; each language has only the classes that it names, and their images.",
        "English uses OpenAI's labels and prompts, as in the published evaluation.",
    ]
    if len(images) != _N_IMAGES:
        notes.append(
            f"{len(images):,} of ImageNet's {_N_IMAGES:,} images: not comparable with published figures."
        )
    usual = Prompts.TEMPLATES if prompts else Prompts.LABELS
    return ClassificationSet("babel-imagenet", images, class_of, tuple(languages), usual, tuple(notes))


def _object(path: Path) -> dict[str, Any]:
    data = json_from_text(text_of(path, BABEL_IMAGENET_LAYOUT), str(path))
    if not isinstance(data, dict):
        raise DatasetError(f"{path} is not a JSON object. Expected layout:\n{BABEL_IMAGENET_LAYOUT}")
    return data


def _names(path: Path, code: str, entry: Any, templates: Any, language_map: LanguageMap) -> ClassNames:
    language = babel_language(code, language_map)
    if code == _ENGLISH:
        labels, english = _openai_names()
        return ClassNames(code, language, tuple(range(_N_CLASSES)), labels, english if templates else ())
    if not (_is_pair(entry) and _is_list_of(entry[0], int) and _is_list_of(entry[1], str)):
        raise DatasetError(
            f"{path}: {code} is not [[class indices], [labels]]. It may be cut short; fetch it again."
        )
    if not _is_list_of(templates, str):
        raise DatasetError(f"{path.parent / 'nllb_dist13b_prompts.json'}: {code} is not a list of strings.")
    outside = [index for index in entry[0] if not 0 <= index < _N_CLASSES]
    if outside:
        raise DatasetError(
            f"{path}: {code} names the classes {outside[:5]}; ImageNet has {_N_CLASSES}, from 0."
        )
    return ClassNames(code, language, tuple(entry[0]), tuple(entry[1]), tuple(templates))


def _openai_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return OpenAI's labels of the 1,000 classes, and its 80 prompts."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    return tuple(IMAGENET_CLASSNAMES), tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
