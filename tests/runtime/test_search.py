"""Encodings keep the order of the cosines; the index returns exactly the best rows."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.embeddings import (
    Encoding,
    bits_from_float,
    cosine_similarity,
    encoded_from_float,
    float_from_int8,
    hamming_distance,
    int8_from_float,
)
from runtime.errors import InputError
from runtime.indexes import exact as search_module
from runtime.indexes.exact import Hit, Index

RNG = np.random.default_rng(3)


def unit(n, dim=48):
    vectors = RNG.standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def index_of(vectors, encoding=Encoding.FLOAT32):
    ids = tuple(f"image {i}" for i in range(len(vectors)))
    return Index(ids, encoded_from_float(vectors, encoding), "space", encoding)


def test_int8_is_a_symmetric_scale_of_127():
    vectors = np.array([[1.0, -1.0, 0.0, 0.5, -0.004, 0.004]], np.float32)
    assert int8_from_float(vectors).tolist() == [[127, -127, 0, 64, -1, 1]]
    assert int8_from_float(np.array([[1.00001, -1.00001]], np.float32)).tolist() == [[127, -127]]


def test_int8_is_within_half_a_step():
    vectors = unit(100)
    assert np.abs(float_from_int8(int8_from_float(vectors)) - vectors).max() <= 0.5 / 127 + 1e-6


def test_int8_keeps_the_cosine():
    vectors = unit(60, 512)
    exact, coarse = vectors @ vectors.T, cosine_similarity(int8_from_float(vectors), int8_from_float(vectors))
    assert np.abs(exact - coarse).max() < 0.015


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 48])
def test_bits_are_packed_signs(dim):
    vectors = unit(5, dim)
    bits = bits_from_float(vectors)
    assert (bits.dtype, bits.shape) == (np.uint8, (5, -(-dim // 8)))
    np.testing.assert_array_equal(np.unpackbits(bits, axis=1)[:, :dim], vectors > 0)


def test_hamming_distance_counts_differing_bits():
    vectors = unit(20, 64)
    signs = vectors > 0
    expected = (signs[:, None] != signs[None]).sum(axis=-1)
    bits = bits_from_float(vectors)
    np.testing.assert_array_equal(hamming_distance(bits, bits), expected)


def test_the_cosine_of_nothing_is_zero():
    assert cosine_similarity(np.zeros((1, 4), np.int8), np.ones((1, 4), np.int8)).tolist() == [[0]]


def test_an_unknown_encoding_is_an_error():
    with pytest.raises(InputError, match="'int4' is unknown"):
        encoded_from_float(unit(1), "int4")


@pytest.mark.parametrize("k", [1, 3, 10, 100, 1000])
@pytest.mark.parametrize("block_rows", [1, 7, 100, 16_384])
def test_search_is_exact(monkeypatch, k, block_rows):
    monkeypatch.setattr(search_module, "_BLOCK_ROWS", block_rows)
    vectors, queries = unit(100), unit(5)
    expected = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]
    found = index_of(vectors).search(queries, fingerprint="space", k=k)
    assert [[hit.id for hit in hits] for hits in found] == [[f"image {i}" for i in row] for row in expected]


@pytest.mark.parametrize("block_rows", [1, 4, 16_384])
def test_equal_scores_keep_the_order_of_the_rows(monkeypatch, block_rows):
    monkeypatch.setattr(search_module, "_BLOCK_ROWS", block_rows)
    vectors = np.repeat(np.eye(2, 48, dtype=np.float32), 5, axis=0)
    (hits,) = index_of(vectors).search(vectors[9:], fingerprint="space", k=7)
    assert [hit.id for hit in hits] == [f"image {i}" for i in (5, 6, 7, 8, 9, 0, 1)]


@pytest.mark.parametrize("encoding", Encoding)
def test_a_vector_finds_itself_in_every_encoding(encoding):
    vectors = unit(50)
    index = index_of(vectors, encoding)
    for i, hits in enumerate(index.search(index.vectors, fingerprint="space", k=1)):
        assert hits[0].id == f"image {i}"
        assert hits[0].score == pytest.approx(1, abs=1e-5)


def test_an_empty_index_finds_nothing():
    assert index_of(unit(0)).search(unit(2), fingerprint="space") == [[], []]


@pytest.mark.parametrize("encoding", Encoding)
def test_an_index_survives_the_disk(tmp_path, encoding):
    index = index_of(unit(9), encoding)
    path = tmp_path / "photos.npz"
    index.save(path)
    read = Index.load(path)
    assert (read.ids, read.fingerprint, read.encoding) == (index.ids, "space", encoding)
    np.testing.assert_array_equal(read.vectors, index.vectors)
    assert [p.name for p in tmp_path.iterdir()] == ["photos.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "photos.npz"
    index_of(unit(2)).save(path)
    before = path.read_bytes()

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space left"):
        index_of(unit(5)).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["photos.npz"]


@pytest.mark.parametrize("content", [None, b"", b"PK garbage", b"\x93NUMPY"])
def test_what_is_no_index_is_an_error(tmp_path, content):
    path = tmp_path / "photos.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"does not exist|is not a babeltower index"):
        Index.load(path)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_an_index_cut_short_is_an_error(tmp_path, kept):
    path = tmp_path / "photos.npz"
    index_of(unit(30)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match="is not a babeltower index"):
        Index.load(path)


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        (unit(1), {"fingerprint": "other"}, "the queries are from 'other'"),
        (unit(1, 47), {}, r"float32 \(1, 47\); this index expects float32 \(n, 48\)"),
        (int8_from_float(unit(1)), {}, "int8"),
        (unit(1)[0], {}, r"\(48,\)"),
        (unit(1), {"k": 0}, "k is 0; expected at least 1"),
    ],
)
def test_queries_that_do_not_fit_are_errors(queries, options, message):
    with pytest.raises(InputError, match=message):
        index_of(unit(3)).search(queries, **{"fingerprint": "space", **options})


@pytest.mark.parametrize(
    ("ids", "vectors", "encoding", "message"),
    [
        (("a",), unit(2), Encoding.FLOAT32, "1 ids for 2 vectors"),
        (("a",), unit(1), Encoding.INT8, "int8 vectors must be int8"),
        (("a",), unit(1)[0], Encoding.FLOAT32, r"float32 \(48,\)"),
    ],
)
def test_an_index_that_does_not_fit_together_is_an_error(ids, vectors, encoding, message):
    with pytest.raises(InputError, match=message):
        Index(ids, vectors, "space", encoding)


def test_a_hit_is_plain():
    (hits,) = index_of(unit(3)).search(unit(1), fingerprint="space", k=1)
    assert isinstance(hits[0], Hit)
    assert isinstance(hits[0].score, float)
