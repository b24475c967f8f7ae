"""Manifest of an exported model: its properties and its files.

Triton treats every *folder* of a model repository as a model, so the manifest is a *file* beside them::

    REPOSITORY/
        NAME.babeltower.json               the manifest of NAME, written last
        NAME_text_tower_fp32/              a Triton model: config.pbtxt, tokenizer.json, 1/model.onnx
        NAME_image_tower_fp32/             a Triton model: config.pbtxt, 1/model.onnx
        NAME_text_tower_int8_openvino/     the same tower in another variant
        …

``REPOSITORY/NAME`` names the model everywhere: on the command line, in ``Encoder.open``, in errors.
A variant is named by its precision, followed by an engine if its graphs are for that engine only; the name is
part of its towers' folder names. All variants share the embedding space, and so the fingerprint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import EngineError, ManifestError
from runtime.storage import sha256_of_file
from runtime.typed_json import OPTIONAL, value_from_json

__all__ = [
    "FORMAT",
    "FRONT_END_FILE",
    "GPU_ENGINES",
    "GRAPH_ENGINES",
    "PACKED_TEXT_RECIPE",
    "TOKENIZER_FILE",
    "WHOLE_TOKENIZER_FILE",
    "Engine",
    "FileRecord",
    "FrontEnds",
    "ImagePreprocessing",
    "KeptBy",
    "KeptVersion",
    "Manifest",
    "Modality",
    "Precision",
    "PrunedVocabulary",
    "TextPreprocessing",
    "TowerFiles",
    "Variant",
    "choice_from_value",
    "front_end_name",
    "manifest_path",
    "model_location",
    "names_in_repository",
    "record_of_file",
    "require_name",
    "tower_folder_name",
    "trial_name",
    "triple",
    "variant_name",
    "verify_file",
]

FRONT_END_FILE = "frontend.json"
"""Name of the file in a front end's version folder that says what it is."""

TOKENIZER_FILE = "tokenizer.json"
"""Name of the tokenizer's file, beside a text tower and in a text front end's version folder."""

WHOLE_TOKENIZER_FILE = "whole_tokenizer.json.gz"
"""Name of the checkpoint's own tokenizer, beside the text tower of a model whose vocabulary was pruned."""

PACKED_TEXT_RECIPE = "packed_text"
"""Entry of a text tower's recipe that says that it computes no padding."""

FORMAT = "babeltower/2"
"""Version of the manifest's layout; readers reject any other."""

_SUFFIX = ".babeltower.json"
Choice = TypeVar("Choice", bound=Enum)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_NAME = 128
"""File systems take 255 bytes; folders of towers and files that are being written add to the name."""


class Precision(str, Enum):
    """Arithmetic of a variant's matrix products."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


class Engine(str, Enum):
    """Library that executes a graph; ``CUDA`` is ONNX Runtime on an NVIDIA GPU, with graphs of its own."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


GRAPH_ENGINES = (Engine.ONNXRUNTIME, Engine.OPENVINO)
"""Engines that read an ONNX file on a CPU; CUDA reads fused graphs, TensorRT plans built for one GPU."""

GPU_ENGINES = (Engine.CUDA, Engine.TENSORRT)
"""Engines that run on an NVIDIA GPU."""


class KeptBy(str, Enum):
    """Rule by which the tokens of a pruned vocabulary are kept.

    ``CHARACTERS`` keeps every token that the languages' characters can spell, and those of given texts.
    ``TEXTS`` keeps the tokens of given texts only: a smaller table, in which fewer other texts have theirs.
    """

    CHARACTERS = "characters"
    TEXTS = "texts"


class Modality(str, Enum):
    """Modality of a tower."""

    TEXT = "text"
    IMAGE = "image"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the repository; ``path`` is relative to the repository, with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TextPreprocessing:
    """Text preprocessing to token ids: ``prefix or [language] + tokens + suffix``, up to ``context_length``.

    ``language_ids`` maps FLORES-200 codes to token ids if the tower has language tokens (required, at
    position 0); otherwise it is empty.
    ``clean`` names the text cleaning of the reference tokenizer: ``"whitespace"`` is open_clip's (ftfy,
    HTML unescape, collapsed whitespace), ``"lower"`` and ``"canonicalize"`` (no ASCII punctuation) are
    open_clip's in lower case, ``"none"`` is transformers'.
    ``padding`` says what the tower makes of padding: ``"masked"``, it does not attend to it;
    ``"unread"``, it is causal and pools a token before it, so that no mask is needed; ``"context"``, it
    attends to it as to any token, so that every text is padded to ``context_length``.
    ``kept_languages`` are the FLORES-200 codes that a pruned vocabulary was kept for, the only ones that a
    text may name; empty for a whole vocabulary.
    """

    context_length: int
    pad_id: int
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    clean: str
    language_ids: Mapping[str, int] = field(default_factory=dict)
    kept_languages: tuple[str, ...] = field(default=(), metadata={OPTIONAL: True})
    padding: str = field(default="masked", metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        _require("clean", self.clean, ("whitespace", "lower", "canonicalize", "none"))
        _require("padding", self.padding, ("masked", "unread", "context"))
        if self.language_ids and self.prefix_ids:
            raise ManifestError(
                "A tower with language tokens puts the language first and has no other prefix."
            )

    @property
    def needs_language(self) -> bool:
        """True if every text needs a language."""
        return bool(self.language_ids)

    @property
    def fixed_length(self) -> bool:
        """True if every text has ``context_length`` tokens, padding included."""
        return self.padding == "context"

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """Names of the tower's inputs, in order."""
        return ("input_ids", "attention_mask") if self.padding == "masked" else ("input_ids",)


@dataclass(frozen=True, slots=True)
class ImagePreprocessing:
    """Image preprocessing to uint8 pixels (3, height, width); the graph itself normalises them.

    ``resize`` is ``"shortest"`` (shortest side to size, then centre crop) or ``"squash"`` (both sides).
    ``order`` is ``"resize-convert"`` (open_clip: resize in the file's own mode, then to RGB) or
    ``"convert-resize"`` (transformers). ``crop_rounding`` is ``"round"`` (torchvision's half to even) or
    ``"floor"`` (transformers') for the crop's offset. ``mean`` and ``std`` are informational: they are folded
    into the graph.
    """

    height: int
    width: int
    resize: str
    interpolation: str
    order: str
    crop_rounding: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        _require("resize", self.resize, ("shortest", "squash"))
        _require("interpolation", self.interpolation, ("bicubic", "bilinear", "nearest", "lanczos"))
        _require("order", self.order, ("resize-convert", "convert-resize"))
        _require("crop_rounding", self.crop_rounding, ("round", "floor"))


@dataclass(frozen=True, slots=True)
class TowerFiles:
    """One tower of a variant: its Triton model, graph, inputs and outputs.

    ``outputs`` maps an embedding width to its output's name: the full width, and one entry per MRL head.
    """

    model: str
    version: int
    graph: str
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    opset: int
    ir_version: int
    max_batch_size: int
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """Both towers in one precision, with their measured agreement with PyTorch.

    ``engines`` are those that parity was measured on, and the only ones that open the variant. ``recipe``
    describes how the graphs were made from the FP32 ones, and ``calibration`` the data behind their scales;
    both are empty if not applicable. ``measured_on`` is the machine of the parity measurement: ``cpu`` and
    its ``instruction_sets``; empty in older manifests.
    """

    precision: Precision
    engines: tuple[str, ...]
    text: TowerFiles
    image: TowerFiles
    tokenizer: str
    parity: Mapping[str, Any]
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    measured_on: Mapping[str, Any] = field(default_factory=dict, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        if not self.engines:
            raise ManifestError("The variant has no measured engine, so no engine may open it.")

    def tower(self, modality: Modality) -> TowerFiles:
        """Return the tower of a modality."""
        return self.text if modality is Modality.TEXT else self.image

    @property
    def packs_text(self) -> bool:
        """Whether the text tower computes no padding; see ``export/graphs/packed_text.py``."""
        return bool(dict(self.recipe.get(Modality.TEXT.value, {})).get(PACKED_TEXT_RECIPE))


@dataclass(frozen=True, slots=True)
class FrontEnds:
    """Triton models that accept texts and image files, in front of one variant's towers."""

    variant: str
    text: str
    image: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """Previously served version whose files are kept; ``babeltower rollout`` can switch back to it.

    ``version`` is that of the front ends, ``key`` the variant's key in the manifest.
    """

    version: int
    key: str
    variant: Variant


@dataclass(frozen=True, slots=True)
class PrunedVocabulary:
    """Part of a checkpoint's vocabulary that a model was exported with.

    Attributes:
        languages: FLORES-200 codes that it was kept for.
        n_tokens: Kept rows of the token table.
        n_whole: Rows of the checkpoint's token table.
        whole_fingerprint: Fingerprint of the model with the whole vocabulary, in whose space the vectors are.
        kept_by: Rule by which tokens were kept.
        sources: Data of the rule: ``characters``, and each file of ``texts`` with its sha256.
        needing: Texts of the retrieval check that need a dropped token, by data set and language:
            ``n_texts``, ``n_needing``, and PyTorch's recall at 1 with the whole and the pruned vocabulary if
            it is not 0; empty if retrieval was not checked.
    """

    languages: tuple[str, ...]
    kept_by: KeptBy
    n_tokens: int
    n_whole: int
    whole_fingerprint: str
    sources: Mapping[str, Any]
    needing: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Complete description of REPOSITORY/NAME.

    ``fingerprint`` identifies the embedding space (weights, tokenizer, preprocessing and the towers' computed
    vectors, see ``runtime/fingerprints.py``): vectors are comparable only if their fingerprints are equal.
    ``languages`` are FLORES-200 codes. ``front_ends`` is empty or has one entry; ``kept`` are versions that
    they served before. ``probes`` is the record of NAME.probes.npz, or empty in older manifests.
    ``vocabulary`` is empty, or has one entry if the vocabulary was pruned.
    """

    name: str
    family: str
    architecture: str
    dim: int
    mrl_dims: tuple[int, ...]
    fingerprint: str
    licence: str
    languages: tuple[str, ...]
    text: TextPreprocessing
    image: ImagePreprocessing
    source: Mapping[str, Any]
    variants: Mapping[str, Variant]
    front_ends: tuple[FrontEnds, ...] = field(default=(), metadata={OPTIONAL: True})
    kept: tuple[KeptVersion, ...] = field(default=(), metadata={OPTIONAL: True})
    probes: tuple[FileRecord, ...] = field(default=(), metadata={OPTIONAL: True})
    vocabulary: tuple[PrunedVocabulary, ...] = field(default=(), metadata={OPTIONAL: True})
    format: str = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ManifestError(
                f"Manifest of {self.name!r} has format {self.format!r}; this babeltower reads {FORMAT!r}. "
                "Export the checkpoint again, or install the version that wrote it."
            )
        require_name(self.name)
        opens: dict[tuple[Precision, str], str] = {}
        for key, variant in self.variants.items():
            for engine in variant.engines:
                other = opens.setdefault((variant.precision, engine), key)
                if other != key:
                    raise ManifestError(
                        f"{self.name!r}: both {other!r} and {key!r} are {variant.precision.value} for "
                        f"{engine}; expected one variant per engine and precision. Export the checkpoint "
                        "again."
                    )

    def variant(self, precision: Precision, engine: str | None = None) -> Variant:
        """Return the variant of a precision that an engine may open.

        Args:
            engine: Optional if the precision has only one variant.

        Raises:
            ManifestError: the model has no such variant, or several variants match.
        """
        return self.variants[self.variant_key(precision, engine)]

    def variant_key(self, precision: Precision, engine: str | None = None) -> str:
        """Return the key in ``variants`` of the result of ``variant``; errors as there."""
        of_precision = {key: v for key, v in self.variants.items() if v.precision is precision}
        found = [key for key, v in of_precision.items() if engine is None or engine in v.engines]
        if len(found) == 1:
            return found[0]
        if found:
            raise ManifestError(f"{self.name!r} has {found} in {precision.value}: pass the engine too.")
        if not of_precision:
            raise ManifestError(
                f"{self.name!r} has no {precision.value} variant; it has {sorted(self.variants)}. "
                f"Export it with --precision {precision.value}{(engine and f' --engine {engine}') or ''}."
            )
        engines = {key: list(variant.engines) for key, variant in of_precision.items()}
        raise ManifestError(
            f"{self.name!r} in {precision.value} was not measured on {engine}; it has {engines}. Open it "
            f"with one of these engines, or export it with --precision {precision.value} --engine {engine}."
        )

    def to_json(self) -> str:
        """Return indented JSON that reads back to an equal manifest."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: str = "manifest") -> Manifest:
        """Read and validate a manifest.

        Raises:
            ManifestError: the text is not JSON, has a missing or unknown field, a wrong type, or another
                format.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                f"{origin} is not valid JSON ({error}). It may be truncated; export the checkpoint again."
            ) from error
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            raise ManifestError(
                f"{origin} has format {data['format']!r}; this babeltower reads {FORMAT!r}. "
                "Export the checkpoint again, or install the version that wrote it."
            )
        manifest: Manifest = value_from_json(cls, data, origin)
        return manifest

    @classmethod
    def read(cls, model: str | os.PathLike[str]) -> Manifest:
        """Read the manifest of ``REPOSITORY/NAME``.

        Raises:
            ManifestError: it is missing or malformed.
        """
        path = manifest_path(model)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ManifestError(_missing(path)) from None
        except UnicodeDecodeError as error:
            raise ManifestError(
                f"{path} is not UTF-8 text ({error}). Copy it from the repository again; an editor may have "
                "saved it in another encoding."
            ) from error
        except OSError as error:
            raise ManifestError(f"{path} cannot be read: {error}.") from error
        manifest = cls.from_json(text, origin=str(path))
        if manifest.name != Path(model).name:
            raise ManifestError(
                f"{path} describes {manifest.name!r}. A manifest cannot be renamed; "
                f"export again with --name {Path(model).name}."
            )
        return manifest

    def verify(self, repository: str | os.PathLike[str], variant: Variant) -> None:
        """Verify the size and sha256 of every file of a variant: graphs, weights, tokenizer.

        Raises:
            ManifestError: a file is missing, truncated or changed, or a required file has no record.
        """
        records = (*variant.text.files, *variant.image.files)
        opened = [f"{t.model}/{t.version}/{t.graph}" for t in (variant.text, variant.image)]
        if missing := {*opened, variant.tokenizer} - {record.path for record in records}:
            raise ManifestError(self._without_checksum(sorted(missing)[0]))
        for record in records:
            verify_file(Path(repository), record)

    def verify_tokenizer(self, repository: str | os.PathLike[str], variant: Variant) -> None:
        """Verify the tokenizer file only; errors as in ``verify``."""
        records = [record for record in variant.text.files if record.path == variant.tokenizer]
        if not records:
            raise ManifestError(self._without_checksum(variant.tokenizer))
        verify_file(Path(repository), records[0])

    def _without_checksum(self, path: str) -> str:
        return (
            f"The manifest of {self.name!r} has no checksum of {path}, so the file cannot be trusted. Copy "
            "the repository again, or export the checkpoint again."
        )

    def verify_front_ends(self, repository: str | os.PathLike[str]) -> None:
        """Verify every file of the front ends; errors as in ``verify``."""
        for front_ends in self.front_ends:
            for record in front_ends.files:
                verify_file(Path(repository), record)


def choice_from_value(kind: type[Choice], value: Choice | str, name: str) -> Choice:
    """Convert a string to an enum member; a member is returned as is.

    Raises:
        EngineError: the value is unknown; ``name`` names the option in the message.
    """
    try:
        return kind(value)
    except ValueError:
        raise EngineError(
            f"{name} {value!r} is unknown; expected one of {[known.value for known in kind]}."
        ) from None


def require_name(name: str) -> None:
    """Check that a model's name is valid in folder names and Triton model names.

    Raises:
        ManifestError: the name has a character that they cannot have, or is too long.
    """
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        shown = repr(name) if len(name) <= _LONGEST_NAME else f"of {len(name)} characters"
        raise ManifestError(
            f"Invalid model name {shown}: use letters, digits, '.', '_' and '-', a letter or digit first, "
            f"and at most {_LONGEST_NAME} of them."
        )


def model_location(model: str | os.PathLike[str]) -> str:
    """Return a model's path or address as text.

    Raises:
        ManifestError: it is neither a string nor a path.
    """
    found = model if isinstance(model, str) else getattr(model, "__fspath__", lambda: None)()
    if not isinstance(found, str):
        raise ManifestError(
            f"The model is {model!r}, of type {type(model).__name__}; expected a path, REPOSITORY/NAME."
        )
    return found


def manifest_path(model: str | os.PathLike[str]) -> Path:
    """Return a model's manifest path: ``REPOSITORY/NAME`` → ``REPOSITORY/NAME.babeltower.json``.

    Raises:
        ManifestError: the path cannot be that of a model.
    """
    location = model_location(model)
    path = Path(location)
    if "://" in location:
        raise ManifestError(f"{location} is an address; expected the path of a model here, REPOSITORY/NAME.")
    if path.name in ("", "..") or "\0" in location:
        inside = [] if "\0" in location else names_in_repository(path)
        raise ManifestError(
            f"{location!r} is not the path of a model. "
            + (f"Pass {path / inside[0]}, one of {inside}." if inside else "Pass REPOSITORY/NAME.")
        )
    if path.name.endswith(_SUFFIX) and path.is_file():
        raise ManifestError(
            f"{path} is a model's manifest. Leave out its suffix: pass {location.removesuffix(_SUFFIX)}."
        )
    return path.with_name(f"{path.name}{_SUFFIX}")


def names_in_repository(repository: Path) -> list[str]:
    """Names of the models whose manifests lie in a folder, sorted; none where it does not exist."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in repository.glob(f"*{_SUFFIX}"))


def front_end_name(name: str, modality: Modality) -> str:
    """Name of the Triton model that takes texts or image files: ``NAME_text``, ``NAME_image``."""
    return f"{name}_{modality.value}"


def trial_name(name: str) -> str:
    """Name under which a new version of a model is probed before it gets traffic."""
    return f"{name}_candidate"


def variant_name(precision: Precision, engine: str | None = None) -> str:
    """Return a variant's key: ``fp32``, or ``int8_openvino`` if the graphs are for one engine only."""
    return precision.value if engine is None else f"{precision.value}_{engine}"


def tower_folder_name(name: str, modality: Modality, variant: str) -> str:
    """Return the name of a tower's Triton model: ``NAME_{text,image}_tower_{variant}``."""
    return f"{name}_{modality.value}_tower_{variant}"


def triple(values: Iterable[float]) -> tuple[float, float, float]:
    """Convert to three floats, one per colour channel.

    Raises:
        ManifestError: there are not three values.
    """
    found = [float(value) for value in values]
    if len(found) != 3:
        raise ManifestError(f"{found} has {len(found)} values; expected one per colour channel.")
    return found[0], found[1], found[2]


def record_of_file(repository: Path, path: Path) -> FileRecord:
    """Return the record of one file of a repository."""
    return FileRecord(path.relative_to(repository).as_posix(), sha256_of_file(path), path.stat().st_size)


def verify_file(repository: Path, record: FileRecord) -> None:
    """Verify one file of a repository against its record; errors as in ``Manifest.verify``."""
    path = repository / record.path
    if not path.resolve().is_relative_to(repository.resolve()):
        raise ManifestError(
            f"The manifest lists {record.path!r}, which is outside {repository}. "
            "If a folder there is a link, put a copy of what it leads to in its place."
        )
    if not path.is_file():
        raise ManifestError(f"{path} is missing, but the manifest lists it. Export the checkpoint again.")
    size_bytes = path.stat().st_size
    if size_bytes != record.size_bytes:
        raise ManifestError(
            f"{path} has {size_bytes} bytes; the manifest says {record.size_bytes}. "
            "The file is truncated or was replaced: copy the repository again, or export again."
        )
    found = sha256_of_file(path)
    if found != record.sha256:
        raise ManifestError(
            f"{path} has sha256 {found[:16]}…; the manifest says {record.sha256[:16]}…. "
            "The file was changed after the export: copy the repository again, or export again."
        )


def _missing(path: Path) -> str:
    found = names_in_repository(path.parent)
    if not path.parent.is_dir():
        return f"{path.parent} is not a folder, so it holds no model. Pass REPOSITORY/NAME."
    name = path.name.removesuffix(_SUFFIX)
    inside = names_in_repository(path.parent / name)
    if inside:
        return (
            f"{path.parent / name} is a repository, not a model; it has {inside}. "
            f"Pass {path.parent / name / inside[0]}."
        )
    return (
        f"{path.parent} has no model named {name!r} (no {path.name}); it has {found}. "
        "Pass REPOSITORY/NAME, or export the checkpoint first."
    )


def _require(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ManifestError(f"{what} {value!r} is unknown; expected one of {list(allowed)}.")
