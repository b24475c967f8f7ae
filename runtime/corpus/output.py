"""Output files of a part: Parquet of ids and vectors, Parquet of bad rows, optional NumPy arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.atomic import write_atomically
from runtime.corpus.journal import PartRecord
from runtime.corpus.pipeline import EmbeddedPart
from runtime.corpus.rows import IdType
from runtime.embeddings import Encoding, encoded_from_float

__all__ = ["LAYOUT_VERSION", "PartWriter", "part_name"]

LAYOUT_VERSION = "1"
_ROW_GROUP = 16_384


def part_name(part: int) -> str:
    """Return the stem of a part's file names: ``part-00000``."""
    return f"part-{part:05d}"


@dataclass(frozen=True, slots=True)
class PartWriter:
    """Writer of parts below one folder; the same part gives the same bytes.

    Attributes:
        metadata: Schema metadata of every file (keys ``babeltower.…``).
        npy: Also write the vectors as ``part-00000.npy``.
    """

    folder: Path
    id_type: IdType
    encoding: Encoding
    metadata: Mapping[str, str]
    npy: bool = False

    def write(self, part: EmbeddedPart) -> PartRecord:
        """Write all files of a part; without good rows there is no vector file.

        Raises:
            CorpusError: the disk is full or not writable.
        """
        stem = part_name(part.number)
        files: dict[str, int] = {}
        if part.bad:
            name = f"bad-rows/{stem}.parquet"
            files[name] = self._write_table(name, self._bad_table(part))
        if part.ids:
            vectors = encoded_from_float(part.vectors, self.encoding)
            if self.npy:
                path = self.folder / f"{stem}.npy"
                files[path.name] = write_atomically(path, lambda p: _save_npy(p, vectors))
            name = f"{stem}.parquet"
            files[name] = self._write_table(name, self._vector_table(part.ids, vectors))
        kinds = Counter(row.kind for row in part.bad)
        counts = {name: value for name, value in asdict(part.counts).items() if value}
        return PartRecord(
            part.number, part.counts.rows, files, counts, dict(sorted(kinds.items())), part.content
        )

    def remove_unfinished(self, parts: Any) -> None:
        """Remove half-written files that a killed run left of the given parts."""
        for folder in (self.folder, self.folder / "bad-rows"):
            for path in folder.glob(".part-*.part"):
                number = path.name.removeprefix(".part-").split(".")[0]
                if number.isdigit() and parts(int(number)):
                    path.unlink(missing_ok=True)

    def remove_stale(self, done: Mapping[int, PartRecord]) -> None:
        """Remove files of parts that were embedded again and have no bad rows, or no good ones, now."""
        for part, record in done.items():
            stem = part_name(part)
            for name in {f"bad-rows/{stem}.parquet", f"{stem}.parquet", f"{stem}.npy"} - record.files.keys():
                (self.folder / name).unlink(missing_ok=True)

    def _write_table(self, name: str, table: Any) -> int:
        import pyarrow
        import pyarrow.parquet

        def write(path: Path) -> None:
            with pyarrow.OSFile(str(path), "wb") as sink:
                pyarrow.parquet.write_table(
                    table,
                    sink,
                    row_group_size=_ROW_GROUP,
                    compression={"id": "zstd", **dict.fromkeys(table.column_names[1:], "none")}
                    if "vector" in table.column_names
                    else "zstd",
                    use_dictionary=False,
                    write_statistics=False,
                )

        return write_atomically(self.folder / name, write)

    def _vector_table(self, ids: list[Any], vectors: NDArray[Any]) -> Any:
        import pyarrow

        flat = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
        column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        schema = pyarrow.schema(
            [
                pyarrow.field("id", self._arrow_id(), nullable=False),
                pyarrow.field("vector", column.type, nullable=False),
            ],
            metadata=dict(self.metadata),
        )
        return pyarrow.Table.from_arrays([self._id_column(ids), column], schema=schema)

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
