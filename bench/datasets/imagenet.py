"""ImageNet's 50,000 validation images, in their usual layouts.

A class's index is its place among the 1,000 WordNet ids in alphabetical order, as in torchvision, timm and
Babel-ImageNet. The development kit numbers classes differently; its own table maps the numbers.

Sources: torchvision's ``ImageNet`` (class folders, ``meta.mat``), Kaggle's ILSVRC (``LOC_val_solution.csv``),
Caffe's ``val.txt``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.datasets.lines import lines_of, require_length
from export.retrieval.sets import ImageOnDisk
from runtime.errors import DatasetError
from runtime.extras import needing

__all__ = ["IMAGENET_LAYOUT", "imagenet_images", "images_of_folders"]

IMAGENET_LAYOUT = """\
    FOLDER/val/n01440764/….JPEG               a folder per class, named by WordNet id; or flat:
    FOLDER/val/ILSVRC2012_val_00000001.JPEG   with one of
      FOLDER/LOC_val_solution.csv             Kaggle's: ImageId,PredictionString
      FOLDER/val.txt                          Caffe's: lines of FILE INDEX
      FOLDER/ILSVRC2012_devkit_t12/data/      the development kit's ground truth and meta.mat"""

_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp"})

Labelled = tuple[tuple[ImageOnDisk, ...], tuple[int, ...]]


def imagenet_images(folder: Path) -> Labelled:
    """Return the images of ``FOLDER/val`` and the class index of each.

    A subset of the images or of the classes is accepted.

    Raises:
        DatasetError: images or ground truth are missing, or the two do not match.
    """
    val = folder / "val"
    if not val.is_dir():
        raise DatasetError(
            f"{val} is not a folder. Put or link it there. Expected layout:\n{IMAGENET_LAYOUT}"
        )
    index_of = _index_of_wnid()
    classes = sorted(path.name for path in val.iterdir() if path.is_dir())
    if classes:
        unknown = [name for name in classes if name not in index_of]
        if unknown:
            raise DatasetError(
                f"{val} holds folders that are not classes of ImageNet-1k: {unknown[:5]}. "
                f"Expected layout:\n{IMAGENET_LAYOUT}"
            )
        return images_of_folders(val, {name: index_of[name] for name in classes})
    return _flat_images(folder, val, index_of)


def images_of_folders(folder: Path, index_of: Mapping[str, int]) -> Labelled:
    """Return the images of class folders, in order of class and file name.

    Args:
        index_of: Class index by folder name.

    Raises:
        DatasetError: no folder holds an image.
    """
    found = [
        (ImageOnDisk(f"{name}/{path.name}", path), index)
        for name, index in index_of.items()
        for path in _image_files(folder / name)
    ]
    if not found:
        raise DatasetError(f"{folder} holds no image with one of the suffixes {sorted(_SUFFIXES)}.")
    images, class_of = zip(*found, strict=True)
    return images, class_of


def _image_files(folder: Path) -> Sequence[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())


def _flat_images(folder: Path, val: Path, index_of: Mapping[str, int]) -> Labelled:
    files = _image_files(val)
    if not files:
        raise DatasetError(f"{val} holds no image. Expected layout:\n{IMAGENET_LAYOUT}")
    for path, read in (
        (folder / "LOC_val_solution.csv", _classes_of_kaggle),
        (folder / "val.txt", _classes_of_caffe),
    ):
        if path.is_file():
            class_of = read(path, index_of)
            break
    else:
        class_of = _classes_of_devkit(folder, files, index_of)
    unlisted = [path.name for path in files if path.stem not in class_of]
    if unlisted:
        raise DatasetError(
            f"{val}: the ground truth lists no class of {len(unlisted)} images; the first is {unlisted[0]!r}."
        )
    images = tuple(ImageOnDisk(path.name, path) for path in files)
    return images, tuple(class_of[path.stem] for path in files)


def _classes_of_kaggle(path: Path, index_of: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for number, row in enumerate(csv.reader(lines_of(path, IMAGENET_LAYOUT)), start=1):
        if row == ["ImageId", "PredictionString"]:
            continue
        wnid = row[1].split(" ")[0] if len(row) == 2 else ""
        if wnid not in index_of:
            raise DatasetError(f"{path}, line {number} is {row}; expected IMAGE,WNID and a box.")
        found[row[0]] = index_of[wnid]
    return found


def _classes_of_caffe(path: Path, index_of: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for number, line in enumerate(lines_of(path, IMAGENET_LAYOUT), start=1):
        name, _, index = line.rpartition(" ")
        if not name or not index.isdecimal() or int(index) >= len(index_of):
            raise DatasetError(
                f"{path}, line {number} is {line[:60]!r}; expected FILE and an index below {len(index_of)}."
            )
        found[Path(name).stem] = int(index)
    return found


def _classes_of_devkit(folder: Path, files: Sequence[Path], index_of: Mapping[str, int]) -> dict[str, int]:
    name = "ILSVRC2012_validation_ground_truth.txt"
    places = (folder / "ILSVRC2012_devkit_t12" / "data", folder)
    data = next((place for place in places if (place / name).is_file()), None)
    if data is None:
        raise DatasetError(f"{folder} holds no ground truth. Expected layout:\n{IMAGENET_LAYOUT}")
    ids = lines_of(data / name, IMAGENET_LAYOUT)
    require_length(data / name, len(ids), len(files), folder / "val")
    wnid_of = _wnid_of_devkit_id(data / "meta.mat")
    try:
        return {path.stem: index_of[wnid_of[int(i)]] for path, i in zip(files, ids, strict=True)}
    except (KeyError, ValueError) as error:
        raise DatasetError(
            f"{data / name} holds {error}, which is not a class of {data / 'meta.mat'}."
        ) from error


def _wnid_of_devkit_id(path: Path) -> dict[int, str]:
    """Map the development kit's class numbers to WordNet ids, for the leaves of its table."""
    remedy = "or put Kaggle's LOC_val_solution.csv or Caffe's val.txt beside the images."
    with needing(f"Reading {path}", "scipy", remedy=remedy):
        from scipy.io import loadmat
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if not row["num_children"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DatasetError(f"{path} is not the development kit's meta.mat: {error}.") from error


def _index_of_wnid() -> dict[str, int]:
    from timm.data import ImageNetInfo

    return {wnid: index for index, wnid in enumerate(sorted(ImageNetInfo("imagenet-1k").label_names()))}
