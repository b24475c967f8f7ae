"""Output files of a part: Parquet of ids and vectors, Parquet of bad rows, optional NumPy arrays."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.folder.kept import KeptColumns
from runtime.corpus.journal import PartRecord, files_of_part
from runtime.corpus.pipeline import EmbeddedPart
from runtime.corpus.rows import IdType
from runtime.corpus.stores import Store, Written
from runtime.embeddings import INT8_SCALE, Encoding, encoded_from_float

__all__ = ["LAYOUT_VERSION", "PartTakenOverError", "PartWriter", "encoding_metadata"]

LAYOUT_VERSION = "1"
_ROW_GROUP = 16_384


class PartTakenOverError(Exception):
    """Another worker claimed the part, since this one was taken for dead."""


def encoding_metadata(encoding: Encoding) -> dict[str, str]:
    """Return the schema metadata from which a reader decodes stored vectors without babeltower."""
    match encoding:
        case Encoding.INT8:
            return {"scale": str(1 / INT8_SCALE), "decoding": f"value / {INT8_SCALE:g}"}
        case Encoding.BINARY:
            return {"scale": "1", "decoding": "bits of each byte from the highest; 1 for >= 0, 0 for < 0"}
        case _:
            return {"scale": "1", "decoding": "value"}


@dataclass(frozen=True, slots=True)
class PartWriter:
    """Writer of parts below one folder; the same part gives the same bytes.

    Attributes:
        metadata: Schema metadata of every file (keys ``babeltower.…``).
        npy: Also write the vectors as ``_npy/part-00000.npy``.
        holds: Predicate: this worker still holds a part.
        kept: Reader of the columns to write beside the vectors.
        rows_per_part: Source rows of each part but the last; needed for kept columns only.
    """

    store: Store
    id_type: IdType
    encoding: Encoding
    metadata: Mapping[str, str]
    npy: bool = False
    holds: Callable[[int], bool] = lambda part: True
    kept: KeptColumns | None = None
    rows_per_part: int = 0

    def write(self, part: EmbeddedPart) -> PartRecord:
        """Write all files of a part; without good rows there is no vector file.

        Raises:
            PartTakenOverError: another worker claimed the part meanwhile.
            CorpusError: the disk is full or not writable.
        """
        vectors_name, bad_name, npy_name = files_of_part(part.number)
        written: dict[str, Written] = {}
        if part.bad:
            written[bad_name] = self._write_table(part.number, bad_name, self._bad_table(part))
        if part.ids:
            vectors = encoded_from_float(part.vectors, self.encoding)
            if self.npy:
                written[npy_name] = self._publish(part.number, npy_name, lambda p: _save_npy(p, vectors))
            table = self._vector_table(part, vectors)
            written[vectors_name] = self._write_table(part.number, vectors_name, table)
        kinds = Counter(row.kind for row in part.bad)
        return PartRecord(
            part.number,
            part.counts.rows,
            {name: file.n_bytes for name, file in written.items()},
            {name: value for name, value in asdict(part.counts).items() if value},
            dict(sorted(kinds.items())),
            {name: file.sha256 for name, file in written.items()},
            round(time.time(), 3),
            part.content,
        )

    def _publish(self, part: int, name: str, write: Callable[[Path], Any]) -> Written:
        """Create a file; what a lost answer or an earlier worker left there is replaced by the holder."""
        while True:
            written = self.store.publish(name, write)
            if written is not None:
                return written
            if not self.holds(part):
                raise PartTakenOverError(name)
            self.store.remove(name)

    def _write_table(self, part: int, name: str, table: Any) -> Written:
        import pyarrow
        import pyarrow.parquet

        def write(path: Path) -> None:
            with pyarrow.OSFile(str(path), "wb") as sink:
                pyarrow.parquet.write_table(
                    table,
                    sink,
                    row_group_size=_ROW_GROUP,
                    compression={name: "none" if name == "vector" else "zstd" for name in table.column_names},
                    use_dictionary=False,
                    write_statistics=False,
                    write_page_checksum=True,
                )

        return self._publish(part, name, write)

    def _vector_table(self, part: EmbeddedPart, vectors: NDArray[Any]) -> Any:
        import pyarrow

        flat = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
        column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        kept = self._kept_of(part)
        schema = pyarrow.schema(
            [
                pyarrow.field("id", self._arrow_id(), nullable=False),
                *([] if kept is None else kept.schema),
                pyarrow.field("vector", column.type, nullable=False),
            ],
            metadata=dict(self.metadata),
        )
        columns = [] if kept is None else kept.columns
        return pyarrow.Table.from_arrays([self._id_column(part.ids), *columns, column], schema=schema)

    def _kept_of(self, part: EmbeddedPart) -> Any:
        """Return the kept columns of a part's good rows."""
        import pyarrow

        if self.kept is None:
            return None
        start = part.number * self.rows_per_part
        is_good = np.ones(part.counts.rows, dtype=np.bool_)
        is_good[[row.row - start for row in part.bad]] = False
        return self.kept.rows(start, start + part.counts.rows).filter(pyarrow.array(is_good))

    def _id_column(self, ids: list[Any]) -> Any:
        import pyarrow

        try:
            return pyarrow.array(ids, self._arrow_id())
        except UnicodeEncodeError:
            return pyarrow.array(map(_stored, ids), self._arrow_id())

    def _bad_table(self, part: EmbeddedPart) -> Any:
        import pyarrow

        schema = pyarrow.schema(
            [
                ("id", self._arrow_id()),
                pyarrow.field("row", pyarrow.int64(), nullable=False),
                pyarrow.field("kind", pyarrow.string(), nullable=False),
                pyarrow.field("reason", pyarrow.string(), nullable=False),
            ],
            metadata=dict(self.metadata),
        )
        return pyarrow.Table.from_pylist(
            [
                {"id": _stored(row.id), "row": row.row, "kind": row.kind, "reason": _stored(row.reason)}
                for row in part.bad
            ],
            schema=schema,
        )

    def _arrow_id(self) -> Any:
        import pyarrow

        return pyarrow.string() if self.id_type is IdType.STRING else pyarrow.int64()


def _stored(value: Any) -> Any:
    """Escape lone surrogates in strings, which file names and broken texts may contain."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _save_npy(path: Path, vectors: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, vectors)
