"""Calibration batches of real multilingual texts and images.

Texts are processed with the runtime's ``Tokenizer`` and images with its ``pixels_from_image``, so that a
graph is calibrated on the same inputs as in serving. Texts are sampled evenly over the tower's languages,
and batches mix lengths, so that padded rows are included.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DatasetError, ImageError, LanguageError
from runtime.manifest import ImagePreprocessing, Modality, TextPreprocessing
from runtime.preprocessing.image import decode, pixels_from_image
from runtime.preprocessing.image_formats import IMAGE_SUFFIXES
from runtime.preprocessing.languages import flores_from_code
from runtime.preprocessing.text import Text, Tokenizer

__all__ = [
    "CalibrationSet",
    "CalibrationSize",
    "calibration_from_folder",
    "calibration_from_parquet",
    "calibration_from_path",
    "calibration_from_samples",
    "columns_of_parquet",
    "samples_folder",
]

_TEXT_BATCH, _IMAGE_BATCH = 32, 16
_CAPTIONS, _DRAWINGS = "captions.parquet", "train.parquet"

Batch = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class CalibrationSize:
    """Sample size and random seed of a calibration set; smaller sources are used completely."""

    n_texts: int = 640
    n_images: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationSet:
    """Calibration batches of both towers.

    Attributes:
        source: Description of the data source; never a path.
        languages: Number of texts by FLORES-200 code; under ``""`` without a language.
    """

    source: str
    seed: int
    languages: Mapping[str, int]
    text: Sequence[Batch]
    image: Sequence[Batch]

    def batches(self, modality: Modality) -> Sequence[Batch]:
        """Return the input batches of a tower's graph, by input name.

        Raises:
            DatasetError: the source has no data for this tower.
        """
        found = self.text if modality is Modality.TEXT else self.image
        if not found:
            raise DatasetError(
                f"The calibration set from {self.source} has no data for the {modality.value} tower. Add "
                f"{'a text column' if modality is Modality.TEXT else 'images'}, or use the default set."
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Return plain values for the manifest: counts, languages, and a hash of the exact inputs."""
        return {
            "source": self.source,
            "seed": self.seed,
            "n_texts": sum(len(batch["input_ids"]) for batch in self.text),
            "n_images": sum(len(batch["pixels"]) for batch in self.image),
            "languages": dict(sorted(self.languages.items())),
            "sha256": _hash((*self.text, *self.image)),
        }


def samples_folder() -> Path:
    """Return the default data folder: the package's copy, or else ``samples/emoji`` of the source tree.

    Raises:
        DatasetError: neither folder exists.
    """
    here = Path(__file__).resolve().parent.parent
    candidates = (here / "sample_data", here.parent / "samples" / "emoji")
    for folder in candidates:
        if (folder / _CAPTIONS).is_file() and (folder / _DRAWINGS).is_file():
            return folder
    raise DatasetError(
        f"No calibration data found: {[str(c) for c in candidates]} do not contain {_CAPTIONS} and "
        f"{_DRAWINGS}. Pass a folder of images or a Parquet file of your own."
    )


def calibration_from_path(
    path: Path | None,
    tokenizer: Tokenizer,
    text: TextPreprocessing,
    image: ImagePreprocessing,
    *,
    languages: Sequence[str],
    size: CalibrationSize | None = None,
) -> CalibrationSet:
    """Read a calibration set from a Parquet file or an image folder, or from the samples if None."""
    if path is None:
        return calibration_from_samples(tokenizer, text, image, languages=languages, size=size)
    read = calibration_from_folder if path.is_dir() else calibration_from_parquet
    return read(path, tokenizer, text, image, languages=languages, size=size)


def calibration_from_samples(
    tokenizer: Tokenizer,
    text: TextPreprocessing,
    image: ImagePreprocessing,
    *,
    languages: Sequence[str],
    folder: Path | None = None,
    size: CalibrationSize | None = None,
) -> CalibrationSet:
    """Read a calibration set from the samples: names of emoji in many languages, and training drawings.

    Args:
        languages: FLORES-200 codes that the tower supports.
        folder: Folder with ``captions.parquet`` and ``train.parquet``; ``samples_folder()`` by default.
    """
    folder = folder or samples_folder()
    captions = columns_of_parquet(folder / _CAPTIONS, ("caption", "flores"))
    drawings = columns_of_parquet(folder / _DRAWINGS, ("image",))["image"]
    texts = list(zip(captions["caption"], captions["flores"], strict=True))
    return _calibration(
        "the samples' training split",
        texts,
        drawings,
        tokenizer,
        text,
        image,
        languages,
        size or CalibrationSize(),
    )


def calibration_from_parquet(
    path: Path,
    tokenizer: Tokenizer,
    text: TextPreprocessing,
    image: ImagePreprocessing,
    *,
    languages: Sequence[str],
    size: CalibrationSize | None = None,
) -> CalibrationSet:
    """Read a calibration set from a Parquet file with columns ``text`` and ``language``, ``image``, or all.

    ``language`` holds FLORES-200 or BCP-47 codes and is optional for a tower without language tokens;
    ``image`` holds encoded bytes.

    Raises:
        DatasetError: the file is unreadable, empty, or lacks those columns.
    """
    columns = columns_of_parquet(path, ())
    if not {"text", "image"} & set(columns):
        raise DatasetError(f"{path} has columns {sorted(columns)}; expected text and language, or image.")
    written = columns.get("text", [])
    if written and "language" not in columns and text.needs_language:
        raise DatasetError(f"{path} has texts but no language column, which this tower requires. Add one.")
    codes = columns.get("language", [None] * len(written))
    texts = [(t, _flores(c, path)) for t, c in zip(written, codes, strict=False) if t is not None]
    images = [data for data in columns.get("image", ()) if data is not None]
    return _calibration(
        path.name, texts, images, tokenizer, text, image, languages, size or CalibrationSize()
    )


def calibration_from_folder(
    folder: Path,
    tokenizer: Tokenizer,
    text: TextPreprocessing,
    image: ImagePreprocessing,
    *,
    languages: Sequence[str],
    size: CalibrationSize | None = None,
) -> CalibrationSet:
    """Read the images of a folder, recursively; texts come from the samples.

    Raises:
        DatasetError: the folder does not exist or has no image.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder; pass a folder of images, or a .parquet file.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DatasetError(f"{folder} contains no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    captions = columns_of_parquet(samples_folder() / _CAPTIONS, ("caption", "flores"))
    texts = list(zip(captions["caption"], captions["flores"], strict=True))
    source = f"{folder.name}, texts of the samples"
    return _calibration(source, texts, paths, tokenizer, text, image, languages, size or CalibrationSize())


def _calibration(
    source: str,
    texts: Sequence[tuple[str, str]],
    images: Sequence[Any],
    tokenizer: Tokenizer,
    text: TextPreprocessing,
    image: ImagePreprocessing,
    languages: Sequence[str],
    size: CalibrationSize,
) -> CalibrationSet:
    random = np.random.default_rng(size.seed)
    drawn = _balanced(texts, text.language_ids or languages, size.n_texts, random)
    if texts and not drawn:
        raise DatasetError(
            f"No text of {source} is in a language that the tower supports, such as {sorted(languages)[:8]}."
        )
    chosen = sorted(random.permutation(len(images))[: size.n_images].tolist())
    return CalibrationSet(
        source=source,
        seed=size.seed,
        languages=Counter(code for _, code in drawn),
        text=tuple(_text_batches(drawn, tokenizer, text, random)),
        image=tuple(_image_batches([images[i] for i in chosen], image)),
    )


def _balanced(
    texts: Iterable[tuple[str, str]], known: Iterable[str], n: int, random: np.random.Generator
) -> list[tuple[str, str]]:
    """Sample evenly: one text per language, then a second of each, until there are enough."""
    spoken = set(known) | {""}
    by_language: dict[str, list[str]] = {}
    for written, code in texts:
        if code in spoken and written.strip():
            by_language.setdefault(code, []).append(written)
    shuffled = {
        code: [found[i] for i in random.permutation(len(found))]
        for code, found in sorted(by_language.items())
    }
    longest = max(map(len, shuffled.values()), default=0)
    rounds = ((found[i], code) for i in range(longest) for code, found in shuffled.items() if i < len(found))
    return [pair for pair, _ in zip(rounds, range(n), strict=False)]


def _text_batches(
    texts: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    preprocessing: TextPreprocessing,
    random: np.random.Generator,
) -> Iterator[Batch]:
    """Yield batches of mixed lengths; every eighth text is joined with others up to the context length."""
    joined = [
        (" ".join(other for other, c in texts[i : i + 400] if c == code) if i % 8 == 0 else written, code)
        for i, (written, code) in enumerate(texts)
    ]
    rows = tokenizer.rows_from_texts([Text(t, i, code or None) for i, (t, code) in enumerate(joined)])
    order = random.permutation(len(rows))
    for start in range(0, len(rows), _TEXT_BATCH):
        ids = [rows[i].ids for i in order[start : start + _TEXT_BATCH]]
        padded = np.full((len(ids), max(map(len, ids))), preprocessing.pad_id, np.int64)
        mask = np.zeros_like(padded)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = row
            mask[i, : len(row)] = 1
        arrays = {"input_ids": padded, "attention_mask": mask}
        yield {name: arrays[name] for name in preprocessing.graph_inputs}


def _image_batches(sources: Sequence[Any], preprocessing: ImagePreprocessing) -> Iterator[Batch]:
    for start in range(0, len(sources), _IMAGE_BATCH):
        part = sources[start : start + _IMAGE_BATCH]
        try:
            pixels = [pixels_from_image(decode(source), preprocessing) for source in part]
        except ImageError as error:
            raise DatasetError(f"A calibration image cannot be read. {error}") from error
        yield {"pixels": np.stack(pixels)}


def columns_of_parquet(path: Path, wanted: Sequence[str]) -> dict[str, list[Any]]:
    """Read columns of a Parquet file as lists; all of them if none is named."""
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DatasetError(f"{path} does not exist; pass a Parquet file, or a folder of images.")
    try:
        table = pyarrow.parquet.read_table(path, columns=list(wanted) or None)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read as Parquet: {error}.") from error
    if missing := sorted(set(wanted) - set(table.column_names)):
        raise DatasetError(f"{path} has no column {missing[0]!r}; it has {table.column_names}.")
    if not table.num_rows:
        raise DatasetError(f"{path} is empty; calibration needs at least one row.")
    columns: dict[str, list[Any]] = table.to_pydict()
    return columns


def _flores(code: str | None, path: Path) -> str:
    if not code:
        return ""
    try:
        return flores_from_code(code)
    except LanguageError as error:
        raise DatasetError(f"{path}: {error}") from error


def _hash(batches: Iterable[Batch]) -> str:
    """Return the hex sha256 of all inputs: names, types, shapes and values."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.items()):
            digest.update(f"{name} {array.dtype} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
