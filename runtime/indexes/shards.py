"""Parquet shards of embedded vectors, as ``babeltower embed`` writes them, read block by block."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.corpus.folder.finished import RecordedFile, files_of_finished_run, recorded_files
from runtime.embeddings import Encoding
from runtime.errors import DamagedVectorsError, InputError
from runtime.extras import parquet, pyarrow
from runtime.fingerprints import remark_on_vectors
from runtime.indexes.conditions import Condition, hit_from_row, rows_that_meet
from runtime.indexes.exact import Hit, Nearest
from runtime.indexes.space import Space
from runtime.machine import n_cores
from runtime.storage import sha256_of_file

__all__ = ["VectorBlock", "VectorShard", "VectorShards", "holds_vectors"]

_SHARD_NAME = re.compile(r"part-\d{5,}\.parquet")
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")
_BLOCK_ROWS = 16_384
_LAYOUT_VERSION = "1"


@dataclass(frozen=True, slots=True)
class VectorBlock:
    """Block of consecutive rows.

    Attributes:
        rows: Arrow record batch of the ids (strings or int64) and the kept columns.
        vectors: Vectors as stored: (rows, dim) of float32, float16 or int8, or uint8 (rows, ceil(dim / 8)).
    """

    rows: Any
    vectors: NDArray[Any]

    @property
    def ids(self) -> Any:
        """Arrow array of the ids."""
        return self.rows.column("id")


@dataclass(frozen=True, slots=True)
class VectorShard:
    """One Parquet file of vectors, described by its schema.

    Attributes:
        model: Name of the model that embedded the rows.
        modality: ``text`` or ``image``.
        source: Source of the embedded rows, as named then; empty if not recorded.
        id_type: ``string`` or ``int64``.
        schema: Arrow schema of the ids and the kept columns.
        sha256: Recorded checksum; ``None`` if there is none.
    """

    path: Path
    space: Space
    model: str
    modality: str
    source: str
    id_type: str
    n_rows: int
    schema: Any
    sha256: str | None

    @classmethod
    def open(cls, path: Path, sha256: str | None = None) -> VectorShard:
        """Read the schema of a shard.

        Raises:
            InputError: the file is damaged, or was not written by babeltower.
        """
        with _reading(path):
            file = _opened(path)
        with file:
            schema, n_rows = file.schema_arrow, file.metadata.num_rows
        said = _said(schema)
        if "fingerprint" not in said:
            raise InputError(
                f"{path} holds no babeltower vectors: its schema has no fingerprint. "
                f"Embed it first: babeltower embed REPOSITORY/NAME {shlex.quote(str(path))} --out VECTORS."
            )
        if said.get("version") != _LAYOUT_VERSION:
            raise InputError(
                f"{path} has layout version {said.get('version')}; this babeltower reads {_LAYOUT_VERSION}. "
                "Embed again, or use the babeltower that wrote it."
            )
        try:
            space = Space(said["fingerprint"], int(said["dim"]), Encoding(said["encoding"]))
            model, modality = said["model"], said["modality"]
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} has invalid vector metadata ({error}). Embed again.") from error
        id_type = _id_type(path, schema, space)
        kept = pyarrow().schema([field for field in schema if field.name != "vector"])
        return cls(path, space, model, modality, said.get("source", ""), id_type, n_rows, kept, sha256)

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Yield record batches of up to 16,384 rows.

        Raises:
            InputError: the file is damaged.
        """
        with _reading(self.path), _opened(self.path) as file:
            yield from file.iter_batches(_BLOCK_ROWS, columns=columns)

    def blocks(self) -> Iterator[VectorBlock]:
        """Yield all rows in blocks; errors as of ``vectors``."""
        names = self.schema.names
        for batch in self.batches([*names, "vector"]):
            yield VectorBlock(batch.select(names), self.vectors(batch.column("vector")))

    def vectors(self, column: Any) -> NDArray[Any]:
        """Return the rows of a column as an array.

        Raises:
            InputError: a vector is null or not finite.
        """
        if column.null_count:
            raise InputError(f"{self.path} holds {column.null_count} rows without a vector. Embed again.")
        flat = column.flatten().to_numpy(zero_copy_only=False)
        vectors: NDArray[Any] = flat.reshape(len(column), -1)
        if vectors.dtype.kind == "f" and not np.isfinite(vectors).all():
            raise InputError(f"{self.path} holds a vector that is not finite. Embed again.")
        return vectors


@dataclass(frozen=True, slots=True)
class VectorShards:
    """Vectors of one embedding space in one or more shards.

    Attributes:
        location: Folder of shards, or a single shard.
        shards: Shards in the order of their rows.
    """

    location: Path
    shards: tuple[VectorShard, ...]

    @classmethod
    def open(
        cls, location: str | os.PathLike[str], *, known: Collection[str | None] = frozenset()
    ) -> VectorShards:
        """Read every shard's schema, and compare its content with the journal's checksum.

        Args:
            location: Folder written by ``babeltower embed``, or one of its shards.
            known: Checksums of shards that need not be compared, since an index of them is used instead.

        Raises:
            InputError: the location is empty, a shard holds no vectors, or the shards' spaces differ.
            UnfinishedRunError: the run is unfinished.
            DamagedVectorsError: a part is missing, a file belongs to no part, or was changed.
        """
        location = Path(location)
        folder = location.parent if location.is_file() else location
        files = _files_of(location)
        with ThreadPoolExecutor(min(len(files), n_cores()) if files else 1) as pool, _reading(folder):
            checks = [
                pool.submit(_require_unchanged, folder / file.name, file.sha256)
                for file in files
                if file.sha256 is not None and file.sha256 not in known
            ]
            for check in checks:
                check.result()
        shards = tuple(VectorShard.open(folder / file.name, file.sha256) for file in files)
        for shard in shards[1:]:
            _require_alike(shards[0], shard)
        return cls(location, shards)

    @property
    def space(self) -> Space:
        """Space of every shard."""
        return self.shards[0].space

    @property
    def model(self) -> str:
        """Name of the model that embedded the rows."""
        return self.shards[0].model

    @property
    def modality(self) -> str:
        """Modality of the rows: ``text`` or ``image``."""
        return self.shards[0].modality

    @property
    def source(self) -> str:
        """Source of the embedded rows; empty if not recorded."""
        return self.shards[0].source

    @property
    def id_type(self) -> str:
        """Type of the ids: ``string`` or ``int64``."""
        return self.shards[0].id_type

    def __len__(self) -> int:
        return sum(shard.n_rows for shard in self.shards)

    def blocks(self) -> Iterator[VectorBlock]:
        """Yield all rows, in order, in blocks of up to 16,384.

        Raises:
            InputError: a shard is damaged, or a vector is null or not finite.
        """
        for shard in self.shards:
            yield from shard.blocks()

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """Return the stored vectors of rows; shards without any of them are not read.

        Args:
            numbers: int64 (n,), ascending, counted over all shards.
        """
        found = []
        for shard, wanted in self._by_shard(numbers):
            start = 0
            for batch in shard.batches(["vector"]):
                here = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
                found.append(shard.vectors(batch.column("vector"))[here])
                start += len(batch)
        return np.concatenate(found) if found else next(iter(self.blocks())).vectors[:0]

    def search(
        self, queries: NDArray[Any], *, fingerprint: str, k: int = 10, where: Sequence[Condition] = ()
    ) -> list[list[Hit]]:
        """Return the ``k`` nearest rows of every query by exhaustive search; equal scores in row order.

        Args:
            queries: float32 (queries, dim), or in the shards' encoding.
            fingerprint: Fingerprint of the encoder that embedded the queries.
            where: Conditions on kept columns, all of which a row must meet.

        Raises:
            InputError: the queries have another embedding space or width, ``k`` is below 1, a condition does
                not fit the columns, or a shard is damaged.
        """
        self.space.require(fingerprint, holder=str(self.location))
        if k < 1:
            raise InputError(f"k is {k}; expected at least 1.")
        decoded = self.space.decoded_queries(queries)
        nearest = Nearest(len(decoded), k)
        for block in self.blocks():
            scores = self.space.scale * (decoded @ self.space.decoded(block.vectors).T)
            if where:
                scores[:, ~rows_that_meet(where, block.rows, holder=str(self.location))] = -np.inf
            nearest.see(scores)
        rows = self._rows_by_number(np.unique(nearest.rows))
        return [
            [
                hit_from_row(rows[row], float(score))
                for row, score in zip(*found, strict=True)
                if np.isfinite(score)
            ]
            for found in zip(nearest.rows.tolist(), nearest.scores, strict=True)
        ]

    def _rows_by_number(self, numbers: NDArray[np.int64]) -> dict[int, Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        for shard, wanted in self._by_shard(numbers):
            table = pyarrow().Table.from_batches(shard.batches(shard.schema.names))
            rows += table.take(pyarrow().array(wanted)).to_pylist()
        return dict(zip(numbers.tolist(), rows, strict=True))

    def _by_shard(self, numbers: NDArray[np.int64]) -> Iterator[tuple[VectorShard, NDArray[np.int64]]]:
        """Yield the shards that hold any of the rows, with the row numbers within the shard."""
        ends = accumulate(shard.n_rows for shard in self.shards)
        for shard, end in zip(self.shards, ends, strict=True):
            first = end - shard.n_rows
            wanted = numbers[(numbers >= first) & (numbers < end)]
            if len(wanted):
                yield shard, wanted - first


def holds_vectors(path: Path) -> bool:
    """Check whether a path is a folder of shards or a Parquet file of vectors."""
    if path.is_dir():
        return any(_SHARD_NAME.fullmatch(entry.name) for entry in path.iterdir())
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    with _reading(path):
        return "fingerprint" in _said(parquet().read_schema(path))


def _files_of(location: Path) -> list[RecordedFile]:
    """Return the files of a location, in the order of their rows."""
    if location.is_file():
        if not (location.parent / "_journal").is_dir():
            return [RecordedFile(location.name, None, None)]
        known = {file.name: file for file in recorded_files(location.parent)}
        return [known.get(location.name, RecordedFile(location.name, None, None))]
    if _URL.match(str(location)):
        shown = str(location).replace(":/", "://", 1)  # a path has joined the slashes
        raise InputError(
            f"{shown} is a URL; vectors are indexed and searched in a local or mounted folder. Copy the "
            "folder to a disk, with its _journal, and pass its path."
        )
    if not location.is_dir():
        raise InputError(f"{location} does not exist; pass a folder written by babeltower embed.")
    files = files_of_finished_run(location)
    if not files:
        raise InputError(
            f"{location} holds no vectors: it has no files such as part-00000.parquet. "
            "Pass a folder written by babeltower embed."
        )
    return files


def _require_unchanged(path: Path, sha256: str) -> None:
    found = sha256_of_file(path)
    if found != sha256:
        raise DamagedVectorsError(
            f"{path} was changed since it was written: its SHA-256 is {found[:12]}…, the journal says "
            f"{sha256[:12]}…. Remove it and run the same babeltower embed command again."
        )


def _require_alike(first: VectorShard, other: VectorShard) -> None:
    for name, one, two in (
        ("fingerprint", first.space.fingerprint, other.space.fingerprint),
        ("width", first.space.dim, other.space.dim),
        ("encoding", first.space.encoding.value, other.space.encoding.value),
        ("modality", first.modality, other.modality),
        ("type of ids", first.id_type, other.id_type),
        ("kept columns", _kept_in_words(first.schema), _kept_in_words(other.schema)),
    ):
        if one != two:
            raise InputError(
                f"The shards are inconsistent: {first.path} has the {name} {one!r}, {other.path} has "
                f"{two!r}. Keep vectors of one model, width and encoding in one folder."
                + (remark_on_vectors(*sorted((str(one), str(two)))) if name == "fingerprint" else "")
            )


def _kept_in_words(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema if field.name != "id")


def _id_type(path: Path, schema: Any, space: Space) -> str:
    arrow = pyarrow()
    items = {
        Encoding.FLOAT32: (arrow.float32(), space.dim),
        Encoding.FLOAT16: (arrow.float16(), space.dim),
        Encoding.INT8: (arrow.int8(), space.dim),
        Encoding.BINARY: (arrow.uint8(), -(-space.dim // 8)),
    }
    expected = arrow.list_(*items[space.encoding])
    found = {field.name: field.type for field in schema}
    if found.get("vector") != expected:
        raise InputError(
            f"{path} claims {space.encoding.value} vectors of width {space.dim}, but its column 'vector' is "
            f"{found.get('vector')}. Embed again."
        )
    if found.get("id") not in (arrow.string(), arrow.int64()):
        raise InputError(f"{path} has ids of type {found.get('id')}; expected string or int64. Embed again.")
    return str(found["id"])


def _said(schema: Any) -> Mapping[str, str]:
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    return {
        key.decode().removeprefix("babeltower."): value.decode()
        for key, value in metadata.items()
        if key.startswith(b"babeltower.")
    }


def _opened(path: Path) -> Any:
    return parquet().ParquetFile(path, page_checksum_verification=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pyarrow().ArrowException, OSError) as error:
        raise DamagedVectorsError(
            f"{path} cannot be read as Parquet ({error}). It is truncated or damaged: restore it or "
            "embed again."
        ) from error
