"""What one version of a front end is (``frontend.json``), and how it is operated (``config.pbtxt``).

The version's folder is complete by itself: this file, the tokenizer and the code lie in it, so that a server
may hold versions of different checkpoints side by side.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import InputError, ManifestError
from runtime.manifest import FRONT_END_FILE, ImagePreprocessing, TextPreprocessing
from runtime.preprocessing.batching import RUN_OVERHEAD
from runtime.typed_json import value_from_json

__all__ = [
    "ImageLimits",
    "ImageSpec",
    "TextLimits",
    "TextSpec",
    "TowerCall",
    "limits_from_parameters",
    "parameters_from_limits",
    "spec_from_folder",
]

_PREFIX = "babeltower_"

Spec = TypeVar("Spec", "TextSpec", "ImageSpec")
Limits = TypeVar("Limits", "TextLimits", "ImageLimits")


@dataclass(frozen=True, slots=True)
class TowerCall:
    """The tower behind a front end: exactly this version of it is called, never "the latest".

    ``outputs`` maps a width to the name of its output, as in the manifest.
    """

    model: str
    version: int
    max_batch_size: int
    dim: int
    outputs: Mapping[str, str]

    def width(self, asked: int | None) -> int:
        """The width to answer with.

        Raises:
            InputError: the model has no vectors that wide.
        """
        width = self.dim if asked is None else asked
        if str(width) not in self.outputs:
            raise InputError(
                f"There are no vectors of width {width}; this model has {sorted(map(int, self.outputs))}. "
                "Narrower ones are heads of their own: a cut vector is none of them."
            )
        return width


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A version of ``NAME_text``."""

    tower: TowerCall
    preprocessing: TextPreprocessing


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """A version of ``NAME_image``."""

    tower: TowerCall
    preprocessing: ImagePreprocessing


@dataclass(frozen=True, slots=True)
class TextLimits:
    """How ``NAME_text`` works and what it refuses.

    Attributes:
        token_budget: Rows × padded length of one call of the tower, in tokens.
        bucket_overhead: What one more call is held to cost, in tokens; texts of a batch are split by length
            where that saves more padding than this.
        max_bytes: UTF-8 bytes of a text.
        max_characters: Characters of a text.
    """

    token_budget: int = 2_048
    bucket_overhead: int = RUN_OVERHEAD
    max_bytes: int = 65_536
    max_characters: int = 16_384


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """How ``NAME_image`` works and what it refuses.

    Attributes:
        decode_threads: Images that are decoded at once.
        max_bytes: Size of an encoded image.
        max_pixels: Width × height, against decompression bombs (Pillow's own limit).
    """

    decode_threads: int = 2
    max_bytes: int = 33_554_432
    max_pixels: int = 89_478_485


def spec_from_folder(kind: type[Spec], folder: Path) -> Spec:
    """Read ``frontend.json`` of a version's folder.

    Raises:
        ManifestError: it is missing or malformed.
    """
    path = folder / FRONT_END_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read: {error}. Write the front ends again.") from error
    spec: Spec = value_from_json(kind, data, str(path))
    return spec


def limits_from_parameters(kind: type[Limits], parameters: Mapping[str, Any]) -> Limits:
    """Limits from the ``parameters`` of a model's configuration, as Triton's JSON gives them.

    Raises:
        ManifestError: a value that is no whole number of at least 1.
    """
    found = {}
    for field in dataclasses.fields(kind):
        entry = parameters.get(_PREFIX + field.name)
        if entry is not None:
            found[field.name] = _positive(_PREFIX + field.name, entry["string_value"])
    return kind(**found)


def parameters_from_limits(limits: TextLimits | ImageLimits) -> dict[str, str]:
    """The parameters that ``limits_from_parameters`` reads."""
    return {_PREFIX + name: str(value) for name, value in dataclasses.asdict(limits).items()}


def _positive(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ManifestError(f"Parameter {name} is {text!r}; expected a whole number of at least 1.")
    return int(text)
