"""Conditions on the columns that vectors carry, and rows of these columns as hits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal, InvalidOperation
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
_BEYOND = Decimal(1 << 66)
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

        Blanks around the value are left out; in quotation marks, single or double, it is taken as it is.

        Raises:
            InputError: the text is none of these.
        """
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise InputError(
                f"Invalid condition {text!r}; expected COLUMN=VALUE, or !=, <, <=, > or >=, such as "
                "'width>=512'."
            )
        value = match[3]
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        return cls(match[1], match[2], value)


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
            found = _compared(compute, column, condition)
        except pyarrow().ArrowException as error:
            raise InputError(
                f"The column {condition.column!r} is of type {column.type}, which cannot be compared with "
                f"{condition.value!r} ({error})."
            ) from error
        met &= compute.fill_null(found, False).to_numpy(zero_copy_only=False)
    return met


def _compared(compute: Any, column: Any, condition: Condition) -> Any:
    """Return a Boolean column of a comparison; null where the column is null."""
    types = pyarrow().types
    compare = getattr(compute, _FUNCTIONS[condition.operator])
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_integer(column.type):
        return _compared_with_integers(compute, column, condition)
    if types.is_timestamp(column.type) and column.type.tz is not None:
        return compare(column, _instant(compute, column.type, condition.value))
    return compare(column, pyarrow().scalar(condition.value).cast(column.type))


def _compared_with_integers(compute: Any, column: Any, condition: Condition) -> Any:
    """Compare integers with any number exactly: ``n > 2.5`` is ``n > 2``, and 2⁵³ + 1 is not 2⁵³."""
    try:
        value = Decimal(condition.value)
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite():
        raise pyarrow().ArrowInvalid(f"{condition.value!r} is no number")
    value = max(-_BEYOND, min(_BEYOND, value))  # bounds the digits
    whole = int(value.to_integral_value(ROUND_FLOOR))
    bits, is_signed = column.type.bit_width, pyarrow().types.is_signed_integer(column.type)
    low = -(1 << (bits - 1)) if is_signed else 0
    high = low + (1 << bits) - 1
    operator, valid = condition.operator, compute.is_valid(column)
    if whole != value:  # no integer equals it: the next lower one decides
        operator = {"<": "<=", ">=": ">"}.get(operator, operator)
    if low <= whole <= high and not (whole != value and operator in ("=", "!=")):
        return getattr(compute, _FUNCTIONS[operator])(column, pyarrow().scalar(whole, column.type))
    met_by_all = {"!=", *(("<", "<=") if whole > high else ()), *((">", ">=") if whole < low else ())}
    return compute.and_(valid, pyarrow().scalar(operator in met_by_all))


def _instant(compute: Any, type_: Any, value: str) -> Any:
    """Return an instant from a date or time; without an offset it is one of the column's time zone."""
    try:
        return pyarrow().scalar(value).cast(type_)
    except pyarrow().ArrowInvalid:
        local = pyarrow().scalar(value).cast(pyarrow().timestamp(type_.unit))
        return compute.assume_timezone(local, type_.tz)


def hit_from_row(row: Mapping[str, Any], score: float) -> Hit:
    """Return a row of ids and kept columns as a hit."""
    kept = {name: value for name, value in row.items() if name not in ("id", PART_COLUMN)}
    id_ = row["id"]
    return Hit(str(id_), score, kept, id_ if isinstance(id_, int) else None)
