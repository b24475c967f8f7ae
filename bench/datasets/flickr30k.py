"""Flickr30k-200 (one caption an image, 200 languages) and Flickr30k-CN (five Mandarin captions an image).

Sources: ``data/`` of NLLB-CLIP's repository; github.com/li-xirong/cross-lingual-cap.
"""

from __future__ import annotations

from pathlib import Path

from bench.datasets.language_maps import LanguageMap, flores_code
from bench.datasets.lines import lines_of
from bench.datasets.xtd import aligned_set, files_by_code
from export.retrieval.sets import Captions, ImageOnDisk, RetrievalSet
from runtime.errors import DatasetError

__all__ = [
    "FLICKR30K_200_LAYOUT",
    "FLICKR30K_CN_LAYOUT",
    "read_flickr30k_200",
    "read_flickr30k_cn",
    "read_flickr30k_cn_val",
]

FLICKR30K_200_LAYOUT = """\
    FOLDER/{eng_Latn,…}.txt    one caption a line
    FOLDER/filenames.txt       one file name a line, in the same order
    FOLDER/images/….jpg        Flickr30k's images"""

FLICKR30K_CN_LAYOUT = """\
    FOLDER/{test,val}.txt      lines of IMAGE#zhm#N<TAB>caption, or IMAGE<TAB>caption
    FOLDER/images/IMAGE.jpg    Flickr30k's images"""

_HUMAN_TRANSLATION = "zhm"
"""Mark of the test split, m for manual; the validation split has none."""


def read_flickr30k_200(folder: Path, language_map: LanguageMap) -> RetrievalSet:
    """Read Flickr30k-200.

    Raises:
        DatasetError: a file is missing, or its lines do not match the images.
    """
    files = files_by_code(folder, r"([a-z]{3}_[A-Z][a-z]{3})\.txt", FLICKR30K_200_LAYOUT)
    names = folder / "filenames.txt"
    return aligned_set("flickr30k-200", folder / "images", names, files, FLICKR30K_200_LAYOUT, language_map)


def read_flickr30k_cn(folder: Path, language_map: LanguageMap) -> RetrievalSet:
    """Read Flickr30k-CN's test split.

    Raises:
        DatasetError: the file is missing or a line is malformed.
    """
    return _read_split("flickr30k-cn", folder, "test", language_map)


def read_flickr30k_cn_val(folder: Path, language_map: LanguageMap) -> RetrievalSet:
    """Read Flickr30k-CN's validation split; NLLB-CLIP's evaluation pools it with the test split.

    Raises:
        DatasetError: the file is missing or a line is malformed.
    """
    return _read_split("flickr30k-cn-val", folder, "val", language_map)


def _read_split(name: str, folder: Path, split: str, language_map: LanguageMap) -> RetrievalSet:
    path = folder / f"{split}.txt"
    index_of: dict[str, int] = {}
    found: dict[str, tuple[list[str], list[int]]] = {}
    for number, line in enumerate(lines_of(path, FLICKR30K_CN_LAYOUT), start=1):
        key, tab, text = line.partition("\t")
        parts = key.split("#")
        if not (tab and parts[0] and text.strip()) or len(parts) not in (1, 3):
            raise DatasetError(
                f"{path}, line {number} is {line[:60]!r}; "
                "expected IMAGE#zhm#N<TAB>caption or IMAGE<TAB>caption."
            )
        code = parts[1] if len(parts) == 3 else _HUMAN_TRANSLATION
        texts, image_of = found.setdefault(code, ([], []))
        texts.append(text.strip())
        image_of.append(index_of.setdefault(parts[0], len(index_of)))
    captions = [
        Captions(code, flores_code(code, language_map), tuple(texts), tuple(image_of))
        for code, (texts, image_of) in found.items()
    ]
    images = tuple(ImageOnDisk(key, folder / "images" / f"{key}.jpg") for key in index_of)
    return RetrievalSet(name, images, tuple(captions))
