"""User-defined classes: a folder of images per class, and a small file of class names per language."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from bench.datasets.class_sets import ClassificationSet, ClassNames, Prompts
from bench.datasets.imagenet import images_of_folders
from bench.datasets.lines import json_from_text, lines_of, text_of
from runtime.errors import DatasetError, LanguageError
from runtime.preprocessing.languages import flores_from_code
from runtime.zeroshot import templates_from_language

__all__ = ["IMAGE_FOLDER_LAYOUT", "read_image_folder"]

IMAGE_FOLDER_LAYOUT = """\
    FOLDER/images/CLASS/….jpg     a folder per class; jpg, jpeg, png, webp
    FOLDER/labels/pt.json         {"labels": {"CLASS": "gato", …}, "templates": ["uma foto de {}", …]}; or
    FOLDER/labels/pt.csv          lines of CLASS,LABEL under that header, in small letters
    FOLDER/labels/pt.templates.txt   optional, with the CSV: one template a line"""


def read_image_folder(folder: Path) -> ClassificationSet:
    """Read class folders and the labels beside them.

    A language may name only some of the classes. A language without templates gets the runtime's, if there
    are any.

    Raises:
        DatasetError: a folder or a file is missing or malformed, or a label names a class that has no folder.
        LanguageError: the name of a labels file is not a language code.
    """
    images, labels = folder / "images", folder / "labels"
    for place in (images, labels):
        if not place.is_dir():
            raise DatasetError(f"{place} is not a folder. Expected layout:\n{IMAGE_FOLDER_LAYOUT}")
    index_of = {name: i for i, name in enumerate(sorted(p.name for p in images.iterdir() if p.is_dir()))}
    files = sorted(path for path in labels.iterdir() if path.suffix in (".json", ".csv"))
    if not index_of or not files:
        raise DatasetError(
            f"{folder} has {len(index_of)} classes and {len(files)} languages; expected at least one each. "
            f"Expected layout:\n{IMAGE_FOLDER_LAYOUT}"
        )
    languages = tuple(_names(path, index_of) for path in files)
    sources, class_of = images_of_folders(images, index_of)
    usual = Prompts.TEMPLATES if all(names.templates for names in languages) else Prompts.LABELS
    return ClassificationSet("image-folder", sources, class_of, languages, usual)


def _names(path: Path, index_of: dict[str, int]) -> ClassNames:
    language = flores_from_code(path.stem)
    labels, templates = _of_json(path) if path.suffix == ".json" else _of_csv(path)
    unknown = [name for name in labels if name not in index_of]
    if unknown:
        raise DatasetError(
            f"{path} labels {unknown[:5]}, which have no folder; there are {list(index_of)[:20]}."
        )
    classes = tuple(index_of[name] for name in labels)
    return ClassNames(path.stem, language, classes, tuple(labels.values()), templates or _known(language))


def _of_json(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    data = json_from_text(text_of(path, IMAGE_FOLDER_LAYOUT), str(path))
    labels: Any = data.get("labels") if isinstance(data, dict) else None
    templates: Any = data.get("templates", []) if isinstance(data, dict) else None
    texts = [*labels.values()] if isinstance(labels, dict) else [None]
    texts += templates if isinstance(templates, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise DatasetError(
            f"{path} is not of the form {{'labels': {{CLASS: LABEL}}, 'templates': [TEMPLATE]}}. "
            f"Expected layout:\n{IMAGE_FOLDER_LAYOUT}"
        )
    return labels, tuple(templates)


def _of_csv(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    labels: dict[str, str] = {}
    rows = csv.reader(lines_of(path, IMAGE_FOLDER_LAYOUT))
    if next(rows, None) != ["class", "label"]:
        raise DatasetError(f"{path} does not begin with the header class,label.")
    for number, row in enumerate(rows, start=2):
        if len(row) != 2 or row[0] in labels:
            raise DatasetError(f"{path}, line {number} is {row}; expected CLASS,LABEL, and each class once.")
        labels[row[0]] = row[1]
    beside = path.with_suffix(".templates.txt")
    return labels, tuple(lines_of(beside, IMAGE_FOLDER_LAYOUT)) if beside.is_file() else ()


def _known(language: str) -> tuple[str, ...]:
    try:
        return templates_from_language(language)
    except LanguageError:
        return ()
