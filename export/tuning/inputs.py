"""Client requests for tuning a server, with typical texts and images."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path

from export.precision.calibration import columns_of_parquet, samples_folder
from export.tuning.load_generator import image_requests, text_requests
from runtime.errors import InputError
from runtime.manifest import Manifest, Modality
from runtime.preprocessing.image import decode
from runtime.preprocessing.image_formats import IMAGE_SUFFIXES

__all__ = ["image_files", "languages_for", "realistic_texts", "requests_for"]

_N_TEXTS, _N_IMAGES = 1_000, 64
_SIZE = (640, 480)


def requests_for(
    manifest: Manifest, modality: Modality, front: str, *, source: Path | None, language: str | None
) -> list[bytes]:
    """Build requests of one row each for the front end ``front``.

    Args:
        source: File of texts, one per line, or folder of images; the samples by default.
        language: Language of the source's texts.

    Raises:
        InputError: the source is empty, or its texts need a language.
    """
    if modality is Modality.IMAGE:
        return image_requests(front, image_files(source))
    if source is None:
        texts, codes = realistic_texts(_N_TEXTS)
        languages = languages_for(manifest, codes)
    else:
        texts = _lines(source)
        languages = [language] * len(texts)
        if manifest.text.needs_language and language is None:
            raise InputError(
                f"{manifest.name} needs the language of the texts; pass --language, e.g. por_Latn."
            )
    return text_requests(front, texts, languages)


def realistic_texts(n_texts: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Sample captions of one to three names, with a fixed seed; return the texts and their languages."""
    columns = columns_of_parquet(samples_folder() / "captions.parquet", ("caption", "flores"))
    by_language: dict[str, list[str]] = {}
    for text, language in zip(columns["caption"], columns["flores"], strict=True):
        by_language.setdefault(language, []).append(text)
    draw = random.Random(seed)
    texts, languages = [], []
    for _ in range(n_texts):
        language = draw.choice(sorted(by_language))
        texts.append(" ".join(draw.choices(by_language[language], k=draw.choice((1, 1, 2, 2, 3)))))
        languages.append(language)
    return texts, languages


def languages_for(manifest: Manifest, codes: Sequence[str]) -> list[str | None]:
    """Map language codes to those of a tower: English for unknown codes, None without language tokens.

    A pruned tower without English takes its first language.
    """
    known = manifest.text.language_ids
    usual = "eng_Latn" if "eng_Latn" in known else next(iter(known), None)
    return [(code if code in known else usual) if known else None for code in codes]


def image_files(folder: Path | None) -> list[bytes]:
    """Read a folder's images unchanged, or the samples' drawings as JPEGs of 640 × 480."""
    if folder is None:
        drawings = columns_of_parquet(samples_folder() / "train.parquet", ("image",))["image"]
        return [_jpeg(drawing) for drawing in drawings[:_N_IMAGES]]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"{folder} contains no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return [path.read_bytes() for path in paths[: 4 * _N_IMAGES]]


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}.") from error
    if not (texts := [line for line in lines if line]):
        raise InputError(f"{path} contains no text. Pass a file with one text per line.")
    return texts


def _jpeg(drawing: bytes) -> bytes:
    file = io.BytesIO()
    decode(drawing).convert("RGB").resize(_SIZE).save(file, "JPEG", quality=90)
    return file.getvalue()
