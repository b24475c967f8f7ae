"""Conditions on the columns that vectors carry, and rows of these columns as hits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.extras import import_optional, pyarrow
from runtime.indexes.exact import Hit

__all__ = ["PART_COLUMN", "Condition", "hit_from_row", "rows_that_meet"]

PART_COLUMN = "_part"
"""Column of an index's rows: number of the part that a row came from."""

_CONDITION = re.compile(r"\s*([^=!<>]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_FUNCTIONS = {
    "=": "equal",
    "!=": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}


@dataclass(frozen=True, slots=True)
class Condition:
    """Comparison of a kept column with a value, such as ``width >= 512``; null meets no condition."""

    column: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse ``COLUMN=VALUE``, also with ``!=``, ``<``, ``<=``, ``>`` or ``>=``.

        Raises:
            InputError: the text is none of these.
        """
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise InputError(
                f"Invalid condition {text!r}; expected COLUMN=VALUE, or !=, <, <=, > or >=, such as "
                "'width>=512'."
            )
        return cls(match[1], match[2], match[3])


def rows_that_meet(conditions: Sequence[Condition], rows: Any, *, holder: str) -> NDArray[np.bool_]:
    """Return which rows of an Arrow table or record batch meet all conditions.

    Args:
        holder: Folder of the rows, for the error message.

    Raises:
        InputError: there is no such column, or the value cannot be compared with it.
    """
    compute = import_optional("pyarrow.compute", "A condition", "babeltower[index]")
    met = np.ones(rows.num_rows, dtype=np.bool_)
    for condition in conditions:
        names = [name for name in rows.schema.names if name != PART_COLUMN]
        if condition.column not in names:
            raise InputError(
                f"{holder} has no column {condition.column!r} to search by; it has {names}. Keep columns "
                f"when embedding: babeltower embed --keep {condition.column}."
            )
        column = rows[condition.column]
        try:
            value = pyarrow().scalar(condition.value).cast(column.type)
            found = getattr(compute, _FUNCTIONS[condition.operator])(column, value)
        except pyarrow().ArrowException as error:
            raise InputError(
                f"The column {condition.column!r} is of type {column.type}, which cannot be compared with "
                f"{condition.value!r} ({error})."
            ) from error
        met &= compute.fill_null(found, False).to_numpy(zero_copy_only=False)
    return met


def hit_from_row(row: Mapping[str, Any], score: float) -> Hit:
    """Return a row of ids and kept columns as a hit."""
    kept = {name: value for name, value in row.items() if name not in ("id", PART_COLUMN)}
    return Hit(str(row["id"]), score, kept)
