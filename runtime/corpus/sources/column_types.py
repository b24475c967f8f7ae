"""Types of Arrow columns: which can hold ids, texts, images and languages, and fields of structs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.corpus.rows import Columns, IdType
from runtime.corpus.sources.base import Reading
from runtime.errors import InputError

__all__ = ["arrow_column", "id_type_of", "is_list", "is_string", "is_uint64", "require_types", "unusable"]


def _type_at(schema: Any, column: str) -> Any | None:
    """Return the type of a column or field, below a dictionary's or extension's; ``None`` if it is missing.

    Raises:
        InputError: a struct has no such field.
    """
    import pyarrow

    if column in schema.names:
        return _plain(schema.field(column).type)
    top, _, rest = column.partition(".")
    if top not in schema.names:
        return None
    kind = _plain(schema.field(top).type)
    for name in rest.split("."):
        fields = [kind.field(i).name for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
        if name not in fields:
            raise InputError(f"Column {top!r} is of type {kind} and has no field {name!r} ({column}).")
        kind = _plain(kind.field(fields.index(name)).type)
    return kind


def _plain(kind: Any) -> Any:
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType) and not isinstance(kind, getattr(pyarrow, "UuidType", ())):
        kind = kind.storage_type
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def is_string(kind: Any) -> bool:
    """Check whether a type is one of strings or bytes of any length, and no view."""
    import pyarrow

    types = pyarrow.types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind)
        or types.is_large_binary(kind)
    )  # fmt: skip


def _is_text(kind: Any) -> bool:
    import pyarrow

    return bool(is_string(kind) or pyarrow.types.is_null(kind) or str(kind) in ("string_view", "binary_view"))


def _is_list(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def is_list(schema: Any, column: str) -> bool:
    """Check whether a column holds lists."""
    kind = _type_at(schema, column)
    return kind is not None and _is_list(kind)


def _is_id(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    is_uuid = isinstance(kind, getattr(pyarrow, "UuidType", ()))
    return bool(_is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or is_uuid)


def unusable(schema: Any, column: str) -> str | None:
    """Return the type of a column that can be neither an id nor a language, in words."""
    kind = _type_at(schema, column)
    return None if kind is None or _is_id(kind) else str(kind)


def require_types(columns: Columns, schema: Any, where: str, reading: Reading) -> None:
    """Check that a file's columns have types that their cells can be read from.

    Raises:
        InputError: one has another type; the message names the file and the remedy.
    """
    import pyarrow

    types = pyarrow.types
    if columns.id is not None and (kind := _type_at(schema, columns.id)) is not None and not _is_id(kind):
        raise InputError(
            f"{where}: the id column {columns.id!r} is of type {kind}; expected strings or integers. Pass "
            "another --id COLUMN, or --id none to number the rows."
        )
    if columns.language is not None:
        kind = _type_at(schema, columns.language)
        if kind is not None and not _is_text(kind) and not (reading.captions and _is_list(kind)):
            raise InputError(
                f"{where}: the language column {columns.language!r} is of type {kind}; expected strings. "
                "Pass another --language-column, or none."
            )
    if columns.text is not None and (kind := _type_at(schema, columns.text)) is not None:
        if _is_list(kind) and _is_text(_plain(kind.value_type)):
            if reading.captions is None:
                raise InputError(
                    f"{where}: the text column {columns.text!r} holds lists ({kind}). Pass --captions first "
                    "to embed the first of each, or --captions each to make each a row, with ids ID#0, ID#1, "
                    "…"
                )
        elif not _is_text(kind):
            fields = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
            remedy = f"Name one of its fields, such as --text {columns.text}.{fields[0]}" if fields else (
                "Pass another --text COLUMN"
            )  # fmt: skip
            raise InputError(
                f"{where}: the text column {columns.text!r} is of type {kind}; expected strings. {remedy}."
            )
    if columns.image is not None and (kind := _type_at(schema, columns.image)) is not None:
        fields = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
        if not _is_text(kind) and not {"bytes", "path"} & set(fields):
            remedy = f"Name one of its fields, such as --image {columns.image}.{fields[0]}" if fields else (
                "Pass another --image COLUMN"
            )  # fmt: skip
            raise InputError(
                f"{where}: the image column {columns.image!r} is of type {kind}; expected bytes, paths, or a "
                f"struct of either. {remedy}."
            )


def id_type_of(columns: Columns, schemas: Mapping[str, Any], reading: Reading) -> IdType:
    """Return the storage type of the ids: integers if every file holds integers, otherwise strings.

    Unsigned 64-bit integers are stored as strings: int64 holds half of them.
    """
    import pyarrow

    if columns.id is None:
        return IdType.INT64
    if reading.id_type is not None:
        return reading.id_type
    kinds = [_type_at(schema, columns.id) for schema in schemas.values()]
    is_whole = all(
        kind is not None and pyarrow.types.is_integer(kind) and not pyarrow.types.is_uint64(kind)
        for kind in kinds
    )
    return IdType.INT64 if is_whole else IdType.STRING


def is_uint64(schema: Any, column: str | None) -> bool:
    """Check whether a column holds unsigned 64-bit integers."""
    import pyarrow

    kind = None if column is None else _type_at(schema, column)
    return kind is not None and bool(pyarrow.types.is_uint64(kind))


def arrow_column(batch: Any, column: str) -> Any:
    """Return a column of a record batch, or the field of a struct that a name with dots leads to."""
    import pyarrow.compute

    if column in batch.schema.names:
        return batch.column(column)
    top, _, rest = column.partition(".")
    found = batch.column(top)
    for name in rest.split("."):
        found = pyarrow.compute.struct_field(found, name)
    return found
