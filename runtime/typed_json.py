"""Conversion of decoded JSON to typed, frozen dataclasses, with strict checks."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from runtime.errors import ManifestError

__all__ = ["OPTIONAL", "value_from_json"]

OPTIONAL = "optional"
"""Key in the metadata of a field that older files lack; its default is then used."""


def value_from_json(kind: Any, value: Any, where: str) -> Any:
    """Build ``kind`` from decoded JSON; fields marked ``OPTIONAL`` in their metadata may be missing.

    Args:
        kind: A dataclass, ``tuple[…]``, ``Mapping[str, …]``, an ``Enum``, ``Any`` or a plain type.
        where: Name of the value in error messages.

    Raises:
        ManifestError: a field is missing or unknown, or a value has another type.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_json(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return _tuple_from_json(arguments, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise ManifestError(f"{where}: expected an object, found {type(value).__name__}.")
        return {k: value_from_json(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enum_from_json(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ManifestError(f"{where}: expected {kind.__name__}, found {value!r}.")
    return value


def _enum_from_json(kind: type[Enum], value: Any, where: str) -> Enum:
    try:
        return kind(value)
    except ValueError:
        known = [member.value for member in kind]
        raise ManifestError(f"{where}: expected one of {known}, found {value!r}.") from None


def _dataclass_from_json(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: expected an object, found {type(value).__name__}.")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    required = {name for name, f in fields.items() if not f.metadata.get(OPTIONAL)}
    unknown, missing = sorted(value.keys() - fields), sorted(required - value.keys())
    if unknown or missing:
        raise ManifestError(
            f"{where}: missing fields {missing}, unknown fields {unknown}. "
            "The manifest was edited or written by another version; export the checkpoint again."
        )
    given = [name for name in fields if name in value]
    return kind(**{name: value_from_json(hints[name], value[name], f"{where}.{name}") for name in given})


def _tuple_from_json(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise ManifestError(f"{where}: expected a list, found {type(value).__name__}.")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ManifestError(f"{where}: expected {len(arguments)} entries, found {len(value)}.")
    return tuple(
        value_from_json(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(arguments, value, strict=True))
    )
