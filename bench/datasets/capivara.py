"""CAPIVARA's evaluation sets (Flickr30k, MS COCO, PraCegoVer): webdataset tars of image and captions.

Source: ``clip_pt/src/evaluate/zero_shot_retrieval.py`` of CAPIVARA's repository: if an image has several
Portuguese captions, those at odd indices are Google's translations and those at even indices Marian's; a
single one is the original.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.datasets.language_maps import LanguageMap, flores_code
from bench.datasets.lines import json_from_text
from export.retrieval.sets import Captions, RetrievalSet, TarSlice, Translator
from runtime.errors import DatasetError

__all__ = ["CAPIVARA_LAYOUT", "read_capivara"]

CAPIVARA_LAYOUT = """\
    FOLDER/*.tar      uncompressed webdataset shards, read in name order (or FOLDER is one .tar), with
        KEY.jpg or KEY.png
        KEY.json      {"captions-en": […], "captions-pt": […], "captions-xh": […], "captions-hi": […]}"""

_PREFIX = "captions-"
_START = {
    Translator.ALL: slice(None),
    Translator.GOOGLE: slice(1, None, 2),
    Translator.MARIAN: slice(0, None, 2),
}


@dataclass(frozen=True, slots=True)
class _Sample:
    image: TarSlice
    captions: dict[str, list[str]]


def read_capivara(folder: Path, language_map: LanguageMap, translator: Translator) -> RetrievalSet:
    """Read CAPIVARA's tars.

    Args:
        translator: Translator whose Portuguese captions are used if an image has several.

    Raises:
        DatasetError: there is no tar, a tar is compressed or broken, or an image or its captions are missing.
    """
    shards = [folder] if folder.is_file() else sorted(folder.glob("*.tar"))
    if not shards:
        raise DatasetError(f"{folder} holds no tar. Expected layout:\n{CAPIVARA_LAYOUT}")
    samples = [sample for shard in shards for sample in _samples(shard)]
    codes = sorted({code for sample in samples for code, texts in sample.captions.items() if texts})
    captions = []
    for code in codes:
        pairs = [
            (text, index)
            for index, sample in enumerate(samples)
            for text in _chosen(sample.captions.get(code, []), code, translator)
        ]
        texts, image_of = zip(*pairs, strict=True)
        captions.append(Captions(code, flores_code(code, language_map), texts, image_of))
    note = f"CAPIVARA: Portuguese captions by translator: {translator.value}."
    return RetrievalSet("capivara", tuple(s.image for s in samples), tuple(captions), (note,))


def _chosen(texts: list[str], code: str, translator: Translator) -> list[str]:
    return texts[_START[translator]] if code == "pt" and len(texts) > 1 else texts


def _samples(shard: Path) -> Iterator[_Sample]:
    images: dict[str, TarSlice] = {}
    captions: dict[str, dict[str, list[str]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition("/")[2].partition(".")
                if suffix in ("jpg", "png"):
                    images[stem] = TarSlice(stem, shard, member.offset_data, member.size)
                elif suffix == "json":
                    captions[stem] = _caption_lists(tar, member, shard)
    except (tarfile.TarError, OSError) as error:
        raise DatasetError(
            f"{shard} cannot be read as an uncompressed tar: {error}. Expected layout:\n{CAPIVARA_LAYOUT}"
        ) from error
    unpaired = sorted(images.keys() ^ captions.keys())
    if unpaired:
        raise DatasetError(
            f"{shard}: {len(unpaired)} samples lack their image or their captions; the first is "
            f"{unpaired[0]!r}. Expected layout:\n{CAPIVARA_LAYOUT}"
        )
    return (_Sample(image, captions[key]) for key, image in images.items())


def _caption_lists(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> dict[str, list[str]]:
    origin = f"{shard}: {member.name}"
    file = tar.extractfile(member)
    data: Any = json_from_text(file.read().decode("utf-8"), origin) if file else None
    if not isinstance(data, dict):
        raise DatasetError(f"{origin} is not a JSON object. Expected layout:\n{CAPIVARA_LAYOUT}")
    lists = {key.removeprefix(_PREFIX): value for key, value in data.items() if key.startswith(_PREFIX)}
    for code, value in lists.items():
        if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise DatasetError(f"{origin}: captions-{code} is not a list of strings.")
    return lists
