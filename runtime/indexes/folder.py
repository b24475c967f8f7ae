"""Index folder, written to a temporary sibling and renamed when complete, and its file of ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.extras import pyarrow
from runtime.indexes.record import RECORD_FILE

__all__ = ["IdsFile", "ids_from_file", "ids_of_rows", "require_free"]


class IdsFile:
    """Writer of ids to an Arrow file; open it with ``create``."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self._writer = writer
        self._schema = schema

    @classmethod
    @contextmanager
    def create(cls, path: Path, id_type: str) -> Iterator[IdsFile]:
        """Open a file for writing.

        Args:
            id_type: ``string`` or ``int64``.
        """
        arrow = pyarrow()
        schema = arrow.schema([("id", id_type)])
        with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_file(file, schema) as writer:
            yield cls(writer, schema)

    def write(self, arrays: Sequence[Any]) -> None:
        """Append Arrow arrays of ids."""
        for array in arrays:
            if len(array):
                self._writer.write_batch(pyarrow().record_batch([array], schema=self._schema))


def ids_from_file(path: Path) -> Any:
    """Return the Arrow column of an index's ids, memory-mapped.

    Raises:
        InputError: the file is missing or damaged.
    """
    arrow = pyarrow()
    try:
        return arrow.ipc.open_file(arrow.memory_map(str(path))).read_all()["id"]
    except (arrow.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read as ids ({error}). Build the index again.") from error


def ids_of_rows(column: Any, rows: NDArray[np.int64]) -> dict[int, str]:
    """Return the ids of rows as strings, by row number."""
    return dict(zip(rows.tolist(), map(str, column.take(pyarrow().array(rows)).to_pylist()), strict=True))


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
