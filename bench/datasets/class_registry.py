"""Registry of classification layouts by name; add an entry to add a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from bench.datasets.babel_imagenet import read_babel_imagenet
from bench.datasets.class_sets import ClassificationSet
from bench.datasets.emoji import read_emoji_classes
from bench.datasets.image_folder import read_image_folder
from bench.datasets.language_maps import LanguageMap
from runtime.errors import DatasetError

__all__ = ["CLASS_LAYOUTS", "read_classes"]

CLASS_LAYOUTS: Mapping[str, Callable[[Path, LanguageMap], ClassificationSet]] = MappingProxyType(
    {
        "emoji": lambda _folder, _map: read_emoji_classes(),
        "babel-imagenet": read_babel_imagenet,
        "image-folder": lambda folder, _map: read_image_folder(folder),
    }
)
"""Readers by name. All but ``emoji`` need a folder."""


def read_classes(
    name: str, folder: Path | None = None, language_map: LanguageMap = LanguageMap.RIGHT
) -> ClassificationSet:
    """Read a classification set from a local folder.

    Args:
        name: One of ``CLASS_LAYOUTS``.
        folder: The data set's own folder; not needed for ``emoji``.

    Raises:
        DatasetError: the name is unknown, no folder is given, or files are missing or malformed.
    """
    if name not in CLASS_LAYOUTS:
        raise DatasetError(
            f"No classification layout is named {name!r}; choose one of {list(CLASS_LAYOUTS)}."
        )
    if folder is None and name != "emoji":
        raise DatasetError(f"The layout {name!r} needs its folder; pass --data FOLDER.")
    return CLASS_LAYOUTS[name](folder or Path(), language_map)
