"""Crossmodal-3600: 3,600 images, about two captions a language in 36 languages.

Source: google.github.io/crossmodal-3600.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.datasets.language_maps import LanguageMap, flores_code
from bench.datasets.lines import json_from_text, lines_of
from export.retrieval.sets import CaptionChoice, Captions, ImageOnDisk, RetrievalSet
from runtime.errors import DatasetError

__all__ = ["CROSSMODAL3600_LAYOUT", "read_crossmodal3600"]

CROSSMODAL3600_LAYOUT = """\
    FOLDER/captions.jsonl     lines of {"image/key": KEY, "ar": {"caption": […]}, …}
    FOLDER/images/KEY.jpg"""


def read_crossmodal3600(folder: Path, language_map: LanguageMap, choice: CaptionChoice) -> RetrievalSet:
    """Read Crossmodal-3600.

    Args:
        choice: All captions, or only the first, as CLIP_benchmark scores it.

    Raises:
        DatasetError: the file is missing or a line is malformed.
    """
    path = folder / "captions.jsonl"
    rows = [
        json_from_text(line, f"{path}, line {number}")
        for number, line in enumerate(lines_of(path, CROSSMODAL3600_LAYOUT), start=1)
    ]
    try:
        keys = [str(row["image/key"]) for row in rows]
        codes = sorted({key for row in rows for key, value in row.items() if _holds_captions(value)})
        captions = [_captions(rows, code, language_map, choice) for code in codes]
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: {error!r}. Expected layout:\n{CROSSMODAL3600_LAYOUT}") from error
    images = tuple(ImageOnDisk(key, folder / "images" / f"{key}.jpg") for key in keys)
    note = {
        CaptionChoice.ALL: "all captions of an image count",
        CaptionChoice.FIRST: "the first caption of an image counts, as in CLIP_benchmark",
    }[choice]
    return RetrievalSet("crossmodal3600", images, tuple(captions), (f"Crossmodal-3600: {note}.",))


def _holds_captions(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.get("caption"))


def _captions(rows: list[Any], code: str, language_map: LanguageMap, choice: CaptionChoice) -> Captions:
    stop = 1 if choice is CaptionChoice.FIRST else None
    pairs = [
        (str(text), index)
        for index, row in enumerate(rows)
        for text in row.get(code, {}).get("caption", [])[:stop]
    ]
    texts, image_of = zip(*pairs, strict=True)
    return Captions(code, flores_code(code, language_map), texts, image_of)
