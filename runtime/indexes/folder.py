"""Index folder, written to a temporary sibling and renamed when complete, and its files of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.faults import FaultKind, fault_kind
from runtime.errors import InputError, OutputFaultError
from runtime.extras import pyarrow
from runtime.indexes.conditions import PART_COLUMN
from runtime.indexes.record import RECORD_FILE

__all__ = ["IdsFile", "require_free", "rows_by_number", "rows_from_file", "written_to"]


class IdsFile:
    """Writer of ids and kept columns to an Arrow file; open it with ``create``."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self._writer = writer
        self._schema = schema

    @classmethod
    @contextmanager
    def create(cls, path: Path, schema: Any) -> Iterator[IdsFile]:
        """Open a file for writing.

        Args:
            schema: Arrow schema of the ids and the kept columns.
        """
        arrow = pyarrow()
        whole = arrow.schema([*schema, (PART_COLUMN, arrow.int32())])
        with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_file(file, whole) as writer:
            yield cls(writer, whole)

    def write(self, rows: Any, parts: NDArray[np.int32]) -> None:
        """Append a record batch of ids and kept columns, and the number of each row's part."""
        if rows.num_rows:
            arrow = pyarrow()
            arrays = [*rows.columns, arrow.array(parts, arrow.int32())]
            self._writer.write_batch(arrow.record_batch(arrays, schema=self._schema))


def rows_from_file(path: Path) -> Any:
    """Return the Arrow table of an index's rows, memory-mapped.

    Raises:
        InputError: the file is missing or damaged.
    """
    arrow = pyarrow()
    try:
        table = arrow.ipc.open_file(arrow.memory_map(str(path))).read_all()
        table["id"]
    except (arrow.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read as ids ({error}). Build the index again.") from error
    return table


def rows_by_number(table: Any, numbers: NDArray[np.int64]) -> dict[int, dict[str, Any]]:
    """Return rows by their number."""
    found = table.take(pyarrow().array(numbers)).to_pylist()
    return dict(zip(numbers.tolist(), found, strict=True))


@contextmanager
def written_to(out: Path, remedy: str) -> Iterator[None]:
    """Raise an error of the file system as the user's: one that may pass, such as a full disk, by its class.

    Raises:
        OutputFaultError: the disk is full, or failed.
        InputError: the place cannot be written to.
    """
    try:
        yield
    except OSError as error:
        message = f"{out} cannot be written ({error}). {remedy}"
        if fault_kind(error) is FaultKind.PASSING:
            raise OutputFaultError(message) from error
        raise InputError(message) from error


def require_free(out: Path, *, replace: bool) -> None:
    """Check that an index may be written to a folder.

    Raises:
        InputError: the folder holds something else, or an index that may not be replaced.
    """
    if not out.exists():
        return
    if not (out / RECORD_FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an index. Choose another folder.")
    if (out / RECORD_FILE).is_file() and not replace:
        raise InputError(f"{out} already holds an index. Pass --replace, or choose another folder.")
