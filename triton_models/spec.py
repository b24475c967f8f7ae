"""Specification (``frontend.json``) and limits (``config.pbtxt``) of one version of a front end.

The version's folder is self-contained: it holds this file, the tokenizer and the code, so that a server may
load versions of different checkpoints side by side.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import InputError, ManifestError
from runtime.manifest import FRONT_END_FILE, ImagePreprocessing, TextPreprocessing
from runtime.preprocessing.batching import RUN_OVERHEAD
from runtime.preprocessing.buckets import GPU_BATCH_TOKENS, GPU_RUN_OVERHEAD
from runtime.preprocessing.served_limits import (
    REQUEST_MEMORY_VARIABLE,
    SERVED_BYTES,
    SERVED_CHARACTERS,
    SERVED_MEMORY_BYTES,
    SERVED_PIXELS,
    largest_file_bytes,
)
from runtime.typed_json import OPTIONAL, value_from_json

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
    """Tower behind a front end: exactly this version is called, never "the latest".

    ``outputs`` maps a width to the name of its output, as in the manifest. ``on_gpu`` limits its runs to the
    shapes of ``runtime/preprocessing/buckets.py``.
    """

    model: str
    version: int
    max_batch_size: int
    dim: int
    outputs: Mapping[str, str]
    on_gpu: bool = field(default=False, metadata={OPTIONAL: True})

    def width(self, asked: int | None) -> int:
        """Return the vector width of the answer.

        Raises:
            InputError: the model does not have the width.
        """
        width = self.dim if asked is None else asked
        if str(width) not in self.outputs:
            raise InputError(
                f"There are no vectors of width {width}; this model has {sorted(map(int, self.outputs))}. "
                "Narrower widths have their own MRL heads: truncated vectors are not valid."
            )
        return width


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Specification of a version of ``NAME_text``."""

    tower: TowerCall
    preprocessing: TextPreprocessing


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Specification of a version of ``NAME_image``."""

    tower: TowerCall
    preprocessing: ImagePreprocessing


@dataclass(frozen=True, slots=True)
class TextLimits:
    """Batching options and input limits of ``NAME_text``.

    Attributes:
        token_budget: Maximum rows × padded length of one call of the tower, in tokens.
        bucket_overhead: Assumed cost of another call, in tokens; texts of a batch are split by length if that
            saves more padding.
        max_bytes: Maximum UTF-8 bytes of a text.
        max_characters: Maximum characters of a text.
        max_request_characters: Maximum characters of all texts of a request; a second or so of tokenizing.
    """

    token_budget: int = 2_048
    bucket_overhead: int = RUN_OVERHEAD
    max_bytes: int = 65_536
    max_characters: int = SERVED_CHARACTERS
    max_request_characters: int = 524_288

    @classmethod
    def on_gpu(cls) -> TextLimits:
        """Return the defaults for a tower on a GPU, which needs larger runs and fewer of them."""
        return cls(token_budget=GPU_BATCH_TOKENS, bucket_overhead=GPU_RUN_OVERHEAD)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Decoding options and input limits of ``NAME_image``.

    Attributes:
        decode_threads: Images decoded concurrently.
        max_bytes: Maximum size of an encoded image.
        max_pixels: Maximum width × height of an image.
        max_memory_bytes: Maximum memory of a request: its files in all processes, and to decode an image.
    """

    decode_threads: int = 2
    max_bytes: int = SERVED_BYTES
    max_pixels: int = SERVED_PIXELS
    max_memory_bytes: int = SERVED_MEMORY_BYTES

    def with_memory(self, megabytes: str | None) -> ImageLimits:
        """Return the limits for the memory that ``babeltower serve`` names, if it names any."""
        if megabytes is None:
            return self
        n_bytes = _positive(REQUEST_MEMORY_VARIABLE, megabytes) * 1_000_000
        return dataclasses.replace(self, max_bytes=largest_file_bytes(n_bytes), max_memory_bytes=n_bytes)


def spec_from_folder(kind: type[Spec], folder: Path) -> Spec:
    """Read ``frontend.json`` from a version's folder.

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
    """Read limits from the ``parameters`` of a model's configuration in Triton's JSON.

    Raises:
        ManifestError: a value is not an integer of at least 1.
    """
    found = {}
    for limit in dataclasses.fields(kind):
        entry = parameters.get(_PREFIX + limit.name)
        if entry is not None:
            found[limit.name] = _positive(_PREFIX + limit.name, entry["string_value"])
    return kind(**found)


def parameters_from_limits(limits: TextLimits | ImageLimits) -> dict[str, str]:
    """Return the parameters that ``limits_from_parameters`` reads."""
    return {_PREFIX + name: str(value) for name, value in dataclasses.asdict(limits).items()}


def _positive(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ManifestError(f"Parameter {name} is {text!r}; expected an integer of at least 1.")
    return int(text)
