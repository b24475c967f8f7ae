"""XTD10 and XTD200: 1,000 COCO images with one caption a language, as line-aligned text files.

Sources: github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10 and ``data/`` of NLLB-CLIP's repository.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from bench.datasets.language_maps import LanguageMap, flores_code
from bench.datasets.lines import lines_of, require_length
from export.retrieval.sets import Captions, ImageOnDisk, RetrievalSet
from runtime.errors import DatasetError

__all__ = ["XTD10_LAYOUT", "XTD200_LAYOUT", "aligned_set", "files_by_code", "read_xtd10", "read_xtd200"]

XTD10_LAYOUT = """\
    FOLDER/captions/test_1kcaptions_{en,es,it,…}.txt   one caption a line
    FOLDER/captions/test_image_names.txt               one file name a line, in the same order
    FOLDER/images/COCO_….jpg"""

XTD200_LAYOUT = """\
    FOLDER/{eng_Latn,…}.txt       one caption a line
    FOLDER/test_image_names.txt   one file name a line, in the same order (XTD10's file of that name)
    FOLDER/images/COCO_….jpg      XTD10's images"""


def read_xtd10(folder: Path, language_map: LanguageMap) -> RetrievalSet:
    """Read XTD10.

    Raises:
        DatasetError: a file is missing, or its lines do not match the images.
    """
    captions = folder / "captions"
    files = files_by_code(captions, r"test_1kcaptions_([A-Za-z]+)\.txt", XTD10_LAYOUT)
    names = captions / "test_image_names.txt"
    return aligned_set("xtd10", folder / "images", names, files, XTD10_LAYOUT, language_map)


def read_xtd200(folder: Path, language_map: LanguageMap) -> RetrievalSet:
    """Read XTD200, with XTD10's image names and images beside the captions.

    Raises:
        DatasetError: a file is missing, or its lines do not match the images.
    """
    files = files_by_code(folder, r"([a-z]{3}_[A-Z][a-z]{3})\.txt", XTD200_LAYOUT)
    names = folder / "test_image_names.txt"
    return aligned_set("xtd200", folder / "images", names, files, XTD200_LAYOUT, language_map)


def files_by_code(folder: Path, pattern: str, layout: str) -> dict[str, Path]:
    """Return the files whose whole name matches, sorted, by the group of the pattern.

    Raises:
        DatasetError: the folder is missing, or no file matches.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder. Expected layout:\n{layout}")
    matches = {path: re.fullmatch(pattern, path.name) for path in sorted(folder.iterdir())}
    files = {match[1]: path for path, match in matches.items() if match}
    if not files:
        raise DatasetError(f"{folder} holds no caption file. Expected layout:\n{layout}")
    return files


def aligned_set(
    name: str,
    images: Path,
    names: Path,
    files: Mapping[str, Path],
    layout: str,
    language_map: LanguageMap,
) -> RetrievalSet:
    """Build a set in which the n-th caption of every file belongs to the n-th image name.

    Raises:
        DatasetError: a file is missing, or its lines do not match the images.
    """
    keys = lines_of(names, layout)
    entries = []
    for code, path in files.items():
        texts = lines_of(path, layout)
        require_length(path, len(texts), len(keys), names)
        entries.append(Captions(code, flores_code(code, language_map), tuple(texts), tuple(range(len(keys)))))
    return RetrievalSet(name, tuple(ImageOnDisk(key, images / key) for key in keys), tuple(entries))
