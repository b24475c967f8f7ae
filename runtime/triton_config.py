"""Triton's ``config.pbtxt``: read, changed and written as ``inference.ModelConfig``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import ManifestError
from runtime.extras import import_optional
from runtime.manifest import Engine, TowerFiles
from runtime.storage import replace_text

__all__ = [
    "CONFIG_FILE",
    "config_from_text",
    "config_of_folder",
    "config_text_of_folder",
    "configuration_messages",
    "engine_of_backend",
    "engine_of_config_text",
    "engine_of_tower",
    "json_from_config",
    "served_version",
    "text_from_config",
    "versions_of_folder",
    "write_config",
    "write_config_from",
]

CONFIG_FILE = "config.pbtxt"


def configuration_messages() -> Any:
    """Generated module of Triton's configuration messages.

    Raises:
        MissingPackageError: tritonclient is not installed.
    """
    return import_optional(
        "tritonclient.grpc.model_config_pb2", "A Triton configuration", "babeltower[client]"
    )


def config_from_text(text: str, *, origin: str) -> Any:
    """Parse a configuration.

    Args:
        origin: Its file or model, for errors.

    Raises:
        ManifestError: it does not parse.
        MissingPackageError: tritonclient is not installed.
    """
    messages, text_format = configuration_messages(), _text_format()
    try:
        return text_format.Parse(text, messages.ModelConfig())
    except text_format.ParseError as error:
        raise ManifestError(
            f"{origin} is no Triton configuration: {error}. Export the checkpoint again."
        ) from error


def text_from_config(config: Any) -> str:
    """Render a configuration as text."""
    return str(_text_format().MessageToString(config, as_utf8=True))


def json_from_config(config: Any) -> str:
    """Render a configuration as JSON, with the names of ``config.pbtxt``."""
    json_format = import_optional(
        "google.protobuf.json_format", "A Triton configuration", "babeltower[client]"
    )
    return str(json_format.MessageToJson(config, preserving_proto_field_name=True))


def config_text_of_folder(folder: Path) -> str:
    """Text of a Triton model's configuration.

    Raises:
        ManifestError: it is missing or cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}. Export the checkpoint again.") from error


def config_of_folder(folder: Path) -> Any:
    """Configuration of a Triton model; errors as of ``config_text_of_folder`` and ``config_from_text``."""
    return config_from_text(config_text_of_folder(folder), origin=str(folder / CONFIG_FILE))


def engine_of_backend(backend: str, *, on_gpu: bool) -> Engine:
    """Return the engine that Triton's backend is, or CUDA for ONNX Runtime's backend on a GPU.

    Raises:
        ValueError: it is no tower's backend.
    """
    engine = Engine(backend)
    return Engine.CUDA if engine is Engine.ONNXRUNTIME and on_gpu else engine


def engine_of_config_text(text: str, *, origin: str) -> Engine:
    """Engine of a tower, by its backend and device.

    The text is not parsed: a server's environment has no tritonclient.

    Args:
        text: Content of the tower's ``config.pbtxt``.
        origin: Its file or model, for errors.

    Raises:
        ManifestError: it has no known backend.
    """
    found = re.search(r'^(?:backend|platform): "([a-z]+)(?:_plan)?"', text, re.MULTILINE)
    on_gpu = re.search(r"^\s*kind: KIND_GPU$", text, re.MULTILINE) is not None
    try:
        return engine_of_backend(found[1] if found else "", on_gpu=on_gpu)
    except ValueError:
        raise ManifestError(f"{origin} has no known tower backend. Export the checkpoint again.") from None


def engine_of_tower(repository: Path, tower: TowerFiles) -> Engine:
    """Return the engine that a tower's ``config.pbtxt`` selects.

    Raises:
        ManifestError: the file is missing, or has no known backend.
    """
    folder = repository / tower.model
    return engine_of_config_text(config_text_of_folder(folder), origin=str(folder / CONFIG_FILE))


def write_config(folder: Path, config: Any) -> None:
    """Replace a Triton model's configuration.

    Raises:
        OSError: it cannot be written; the old one is unchanged.
    """
    replace_text(folder / CONFIG_FILE, text_from_config(config))


def write_config_from(
    origin: Path,
    folder: Path,
    *,
    versions: Sequence[int],
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Copy the configuration of one Triton model to another, under the latter's name.

    Args:
        versions: Versions that Triton shall load.
        parameters: Parameters to set.
    """
    config = config_of_folder(origin)
    config.name = folder.name
    config.version_policy.specific.versions[:] = list(versions)
    for key, value in (parameters or {}).items():
        config.parameters[key].string_value = value
    write_config(folder, config)


def versions_of_folder(folder: Path) -> list[int]:
    """Numbers of a Triton model's version folders, ascending."""
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())


def served_version(folder: Path) -> int:
    """Version that a Triton model's configuration selects; the highest one where it selects none.

    Raises:
        ManifestError: the folder holds no version.
    """
    pinned = config_of_folder(folder).version_policy.specific.versions
    found = [int(version) for version in pinned] or versions_of_folder(folder)
    if not found:
        raise ManifestError(f"{folder} holds no version. Export the checkpoint again.")
    return max(found)


def _text_format() -> Any:
    return import_optional("google.protobuf.text_format", "A Triton configuration", "babeltower[client]")
