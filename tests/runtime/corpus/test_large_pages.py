"""Parquet columns whose pages are too large to hold: read in pieces, they give what pyarrow reads."""

from __future__ import annotations

import contextlib
import io
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.corpus import Columns, open_source
from runtime.corpus.sources import parquet_table
from runtime.corpus.sources.parquet_headers import numbers_from_hybrid, page_at
from runtime.corpus.sources.parquet_pages import ColumnChunk, values_of_chunk
from runtime.corpus.sources.snappy import FarReferenceError, pieces_of_snappy
from runtime.errors import DamagedFileError

WORDS = ("gato", "preto", "猫", "dorme", "sobre", "a", "cama", "небо")
CODECS = ("none", "snappy", "gzip", "zstd", "brotli", "lz4")


def texts(n: int, *, seed: int = 0, longest: int = 3_000) -> list[str | None]:
    """Texts of many lengths, some null, some empty, some twice."""
    chance = random.Random(seed)
    found: list[str | None] = []
    for i in range(n):
        kind = chance.random()
        if kind < 0.1:
            found.append(None)
        elif kind < 0.3 and i:
            found.append(found[chance.randrange(i)])
        else:
            found.append(" ".join(chance.choices(WORDS, k=chance.randrange(longest // 5))))
    return found


def read(path: Path) -> list[bytes | None]:
    file = pq.ParquetFile(path)
    values: list[bytes | None] = []
    with path.open("rb") as raw:
        for group in range(file.num_row_groups):
            chunk = ColumnChunk.of(file.metadata.row_group(group), file.schema, 0)
            assert chunk is not None
            values += values_of_chunk(raw, chunk)
    return values


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("codec", CODECS)
def test_every_compression_and_page(tmp_path, codec, dictionary, version):
    expected = texts(900)
    pq.write_table(
        pa.table({"text": expected}),
        tmp_path / "a.parquet",
        compression=codec,
        use_dictionary=dictionary,
        data_page_version=version,
        data_page_size=20_000,
        row_group_size=700,
        write_page_checksum=True,
    )
    assert read(tmp_path / "a.parquet") == [None if t is None else t.encode() for t in expected]


@pytest.mark.parametrize("required", [True, False])
def test_few_values_many_times(tmp_path, required):
    """A dictionary of three: runs, and bit-packed numbers."""
    chance = random.Random(3)
    values = [chance.choice(("a", "b" * 5_000, "c")) for _ in range(300)] + ["c"] * 1_000
    field = pa.field("text", pa.string(), nullable=not required)
    pq.write_table(pa.table({"text": values}, schema=pa.schema([field])), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [value.encode() for value in values]


def test_what_other_writers_write(tmp_path):
    polars = pytest.importorskip("polars")
    duckdb = pytest.importorskip("duckdb")
    expected = texts(500, seed=5)
    stored = [None if t is None else t.encode() for t in expected]
    frame = polars.DataFrame({"text": expected})
    n_read = 0
    for codec in ("snappy", "zstd", "lz4", "uncompressed"):
        frame.write_parquet(tmp_path / "p.parquet", compression=codec)
        duckdb.sql(f"COPY frame TO '{tmp_path / 'd.parquet'}' (FORMAT parquet, COMPRESSION {codec})")
        for name in ("p.parquet", "d.parquet"):
            file = pq.ParquetFile(tmp_path / name)
            if ColumnChunk.of(file.metadata.row_group(0), file.schema, 0) is not None:
                assert read(tmp_path / name) == stored
                n_read += 1
    assert n_read


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take every page for a large one, and many batches for a file; the names of what was read in pieces."""
    seen: list[str] = []
    real = parquet_table.ParquetTable._large_columns

    def large(self, group, columns):
        found = real(self, group, columns)
        seen.extend(found)
        return found

    monkeypatch.setattr(parquet_table.ParquetTable, "_large_columns", large)
    monkeypatch.setattr(parquet_table, "PIECE_BYTES", 10_000)
    return seen


def rows_of(path: Path, **columns: str) -> list[tuple[Any, Any]]:
    source = open_source(path, columns=Columns(**columns))
    return [
        (id_, item)
        for piece in source.read(0, lambda start, stop: True)
        for id_, item in zip(piece.ids, piece.items, strict=True)
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()], ids=str)
def test_a_table_with_ids_beside(tmp_path, in_pieces, kind):
    stored = [None if t is None else t.encode() for t in texts(900)]
    ids = [f"row {i}" for i in range(900)]
    column = pa.array(stored, pa.large_binary()).cast(kind)
    pq.write_table(pa.table({"text": column, "id": ids, "n": range(900)}), tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")
    assert set(in_pieces) == {"text"}
    assert [i for i, _ in found] == ids
    problems = {None: "null-text", b"": "empty-text"}
    assert [getattr(item, "kind", item) for _, item in found] == [
        problems[t] if not t else t.decode() for t in stored
    ]


def test_pictures_in_structs(tmp_path, in_pieces):
    chance = random.Random(9)
    cells: list[Any] = [
        {"bytes": chance.randbytes(chance.randrange(1, 9_000)), "path": f"{i}"} for i in range(99)
    ]
    cells[5] = None
    cells[7] = {"bytes": None, "path": None}
    pq.write_table(pa.table({"key": range(99), "image": cells}), tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")
    assert set(in_pieces) == {"image"}
    assert [i for i, _ in found] == list(range(99))
    assert [getattr(item, "kind", item) for _, item in found] == [
        "null-image" if not cell or cell["bytes"] is None else cell["bytes"] for cell in cells
    ]


def test_a_field_of_a_struct(tmp_path, in_pieces):
    cells = [{"caption": t, "n": 3, "key": f"k{i}"} for i, t in enumerate(texts(200))]
    pq.write_table(pa.table({"meta": cells}), tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet", text="meta.caption", id="meta.key")
    assert set(in_pieces) == {"meta"}
    assert [i for i, _ in found] == [cell["key"] for cell in cells]
    assert [item for _, item in found if isinstance(item, str)] == [
        c["caption"] for c in cells if c["caption"]
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_page_is_named(tmp_path, in_pieces, codec):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(900)}), path, compression=codec, write_page_checksum=True)
    whole = path.read_bytes()
    for at in (60, len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        with pytest.raises(DamagedFileError, match=r"a\.parquet cannot be read as parquet"):
            rows_of(path)


@pytest.mark.parametrize("seed", range(40))
def test_damage_without_checksums_is_an_error_or_other_text(tmp_path, in_pieces, seed):
    """Never a crash: a byte that no checksum covers."""
    chance = random.Random(seed)
    path = tmp_path / "a.parquet"
    codec, version = chance.choice(CODECS), chance.choice(("1.0", "2.0"))
    pq.write_table(pa.table({"text": texts(60)}), path, compression=codec, data_page_version=version)
    whole = bytearray(path.read_bytes())
    n_bytes = pq.ParquetFile(path).metadata.row_group(0).column(0).total_compressed_size
    whole[chance.randrange(4, n_bytes)] ^= 255
    path.write_bytes(whole)
    with contextlib.suppress(DamagedFileError):
        assert len(rows_of(path)) == 60


@pytest.mark.parametrize("header", [b"\x15" + b"\xff" * 70_000, b"\x1c" * 70_000], ids=["number", "struct"])
def test_headers_without_an_end(header):
    with pytest.raises(EOFError, match=r"more than 64 bits|header is damaged"):
        page_at(io.BytesIO(header), 0, len(header))


def test_levels_that_are_cut_off():
    with pytest.raises(EOFError, match="end early"):
        numbers_from_hybrid(b"\x80", 1, 8)


@pytest.mark.parametrize("n", [0, 1, 61, 65_535, 65_536, 65_537, 3_000_000])
@pytest.mark.parametrize("content", ["random", "text", "zeros"])
def test_snappy_in_pieces(n, content):
    words = " ".join(random.Random(n).choices(WORDS, k=n // 4 + 1)).encode()
    data = {"random": os.urandom(n), "text": words[:n], "zeros": bytes(n)}[content]
    packed = pa.Codec("snappy").compress(data, asbytes=True)
    pieces = list(pieces_of_snappy(io.BytesIO(packed).read))
    assert b"".join(pieces) == data
    if len(packed) > 1 << 19:
        assert len(pieces) > 1


def test_snappy_that_refers_far_back():
    head, tail = os.urandom(70_000), b"\xff" + (70_000).to_bytes(4, "little")  # 64 bytes from the beginning
    block = b"\xb0\xa3\x04" + bytes([62 << 2]) + (69_999).to_bytes(3, "little") + head + tail
    assert pa.Codec("snappy").decompress(block, 70_064, asbytes=True) == head + head[:64]
    read = io.BytesIO(block).read
    assert b"".join(pieces_of_snappy(read)) == head + head[:64]  # within what is still held
    long = os.urandom(600_000)
    block = b"\x80\xd0\x24" + bytes([62 << 2]) + (599_999).to_bytes(3, "little") + long
    block = _varint(600_064) + block[3:] + b"\xff" + (600_000).to_bytes(4, "little")
    assert pa.Codec("snappy").decompress(block, 600_064, asbytes=True) == long + long[:64]
    with pytest.raises(FarReferenceError):
        list(pieces_of_snappy(_in_two(block, 600_008)))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _in_two(data: bytes, at: int):
    pieces = iter((data[:at], data[at:]))
    return lambda n_bytes: next(pieces, b"")
