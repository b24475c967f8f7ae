"""Registry of retrieval layouts by name; add an entry to add a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from bench.datasets.capivara import read_capivara
from bench.datasets.coco_cn import read_coco_cn
from bench.datasets.crossmodal3600 import read_crossmodal3600
from bench.datasets.emoji import read_emoji
from bench.datasets.flickr30k import read_flickr30k_200, read_flickr30k_cn, read_flickr30k_cn_val
from bench.datasets.language_maps import LanguageMap
from bench.datasets.xtd import read_xtd10, read_xtd200
from export.retrieval.sets import CaptionChoice, MissingImages, RetrievalSet, Translator
from runtime.errors import DatasetError

__all__ = ["LAYOUTS", "ReadOptions", "read"]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Options that published evaluations set differently; each is in the set's notes or the record."""

    language_map: LanguageMap = LanguageMap.RIGHT
    captions: CaptionChoice = CaptionChoice.ALL
    translator: Translator = Translator.ALL
    missing_images: MissingImages = MissingImages.REFUSE


LAYOUTS: Mapping[str, Callable[[Path, ReadOptions], RetrievalSet]] = MappingProxyType(
    {
        "emoji": lambda _folder, _options: read_emoji(),
        "xtd10": lambda folder, options: read_xtd10(folder, options.language_map),
        "xtd200": lambda folder, options: read_xtd200(folder, options.language_map),
        "flickr30k-200": lambda folder, options: read_flickr30k_200(folder, options.language_map),
        "flickr30k-cn": lambda folder, options: read_flickr30k_cn(folder, options.language_map),
        "flickr30k-cn-val": lambda folder, options: read_flickr30k_cn_val(folder, options.language_map),
        "coco-cn": lambda folder, options: read_coco_cn(folder, options.language_map),
        "crossmodal3600": lambda folder, options: read_crossmodal3600(
            folder, options.language_map, options.captions
        ),
        "capivara": lambda folder, options: read_capivara(folder, options.language_map, options.translator),
    }
)
"""Readers by name. All but ``emoji`` need a folder."""


def read(name: str, folder: Path | None = None, options: ReadOptions | None = None) -> RetrievalSet:
    """Read a retrieval set from a local folder.

    Args:
        name: One of ``LAYOUTS``.
        folder: The data set's own folder; not needed for ``emoji``.

    Raises:
        DatasetError: the name is unknown, no folder is given, or files are missing or malformed.
    """
    options = options or ReadOptions()
    if name not in LAYOUTS:
        raise DatasetError(f"No layout is named {name!r}; choose one of {list(LAYOUTS)}.")
    if folder is None and name != "emoji":
        raise DatasetError(f"The layout {name!r} needs its folder; pass --data FOLDER.")
    dataset = LAYOUTS[name](folder or Path(), options)
    return dataset.with_present_images(options.missing_images)
