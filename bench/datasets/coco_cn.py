"""COCO-CN's test split: 1,000 images, with sentences written (``cn``) and translated (``zhm``) by people.

The published text is segmented into words by spaces and kept unchanged. Source: github.com/li-xirong/coco-cn,
in the COCO form of NLLB-CLIP's repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.datasets.language_maps import LanguageMap, flores_code
from bench.datasets.lines import json_from_text, text_of
from export.retrieval.sets import Captions, ImageOnDisk, RetrievalSet
from runtime.errors import DatasetError

__all__ = ["COCO_CN_LAYOUT", "read_coco_cn"]

COCO_CN_LAYOUT = """\
    FOLDER/captions.json      {"images": [{"id", "file_name"}],
                               "annotations": [{"image_id", "source": "cn" or "zhm", "caption"}]}
    FOLDER/images/COCO_….jpg"""


def read_coco_cn(folder: Path, language_map: LanguageMap) -> RetrievalSet:
    """Read COCO-CN.

    Raises:
        DatasetError: the file is missing or malformed, or an annotation names an unknown image.
    """
    path = folder / "captions.json"
    data = json_from_text(text_of(path, COCO_CN_LAYOUT), str(path))
    try:
        names = {image["id"]: str(image["file_name"]) for image in data["images"]}
        rows = [(str(row["source"]), row["image_id"], str(row["caption"])) for row in data["annotations"]]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{path} lacks {error}. Expected layout:\n{COCO_CN_LAYOUT}") from error
    images = tuple(ImageOnDisk(name, folder / "images" / name) for name in names.values())
    return RetrievalSet("coco-cn", images, _captions(path, names, rows, language_map))


def _captions(
    path: Path, names: dict[Any, str], rows: list[tuple[str, Any, str]], language_map: LanguageMap
) -> tuple[Captions, ...]:
    index_of = {image: index for index, image in enumerate(names)}
    found: dict[str, tuple[list[str], list[int]]] = {}
    for code, image, text in rows:
        if image not in index_of:
            raise DatasetError(
                f"{path}: the caption {text[:40]!r} names image {image!r}, which 'images' does not list. "
                "The file may be cut short; fetch it again."
            )
        texts, image_of = found.setdefault(code, ([], []))
        texts.append(text)
        image_of.append(index_of[image])
    return tuple(
        Captions(code, flores_code(code, language_map), tuple(texts), tuple(image_of))
        for code, (texts, image_of) in found.items()
    )
