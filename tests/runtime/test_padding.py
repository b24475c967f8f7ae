"""Padding to buckets: shapes, and vectors that stay what they were on every sample tower."""

from __future__ import annotations

import numpy as np
import pytest
from precision_models import TOWERS, batches_of, graph_of, tower_id
from sample_models import Exported

from runtime.backends import open_backend
from runtime.backends.padding import buckets_of_profile, padded_to_bucket
from runtime.backends.plans import Extent, Profile
from runtime.errors import InputError
from runtime.manifest import Engine, Modality, Precision
from runtime.preprocessing.buckets import image_buckets, text_buckets


def test_texts_are_padded_in_both_dimensions() -> None:
    inputs = {"input_ids": np.full((3, 9), 7), "attention_mask": np.ones((3, 9), np.int64)}
    padded, n_rows = padded_to_bucket(inputs, text_buckets(77))
    assert n_rows == 3
    assert {array.shape for array in padded.values()} == {(4, 16)}
    np.testing.assert_array_equal(padded["input_ids"][:3, :9], inputs["input_ids"])
    assert padded["input_ids"][3:].sum() == padded["input_ids"][:, 9:].sum() == 0
    np.testing.assert_array_equal(padded["attention_mask"].sum(1), [9, 9, 9, 1])


def test_texts_without_a_mask_are_padded_alike() -> None:
    padded, n_rows = padded_to_bucket({"input_ids": np.full((3, 9), 7)}, text_buckets(77))
    assert (n_rows, padded["input_ids"].shape) == (3, (4, 16))


def test_texts_of_a_fixed_length_are_padded_in_rows_only() -> None:
    padded, n_rows = padded_to_bucket({"input_ids": np.full((3, 64), 7)}, image_buckets())
    assert (n_rows, padded["input_ids"].shape) == (3, (4, 64))
    assert padded["input_ids"][3:].sum() == 0


def test_images_are_padded_with_empty_ones() -> None:
    pixels = np.full((5, 3, 2, 2), 9, np.uint8)
    padded, n_rows = padded_to_bucket({"pixels": pixels}, image_buckets())
    assert (n_rows, padded["pixels"].shape, padded["pixels"].dtype) == (5, (8, 3, 2, 2), np.uint8)
    assert padded["pixels"][5:].sum() == 0


def test_a_batch_of_a_bucket_s_shape_is_not_copied() -> None:
    inputs = {"input_ids": np.ones((2, 16), np.int64), "attention_mask": np.ones((2, 16), np.int64)}
    padded, _ = padded_to_bucket(inputs, text_buckets(77))
    assert all(padded[name] is array for name, array in inputs.items())


def test_a_batch_over_every_bucket_is_refused() -> None:
    with pytest.raises(InputError, match="A batch of 9 rows"):
        padded_to_bucket({"pixels": np.zeros((9, 3, 2, 2), np.uint8)}, image_buckets(max_rows=8))


def test_a_profile_s_buckets_end_at_its_largest_shape() -> None:
    text = buckets_of_profile(Profile({"batch": Extent(1, 8, 20), "sequence": Extent(1, 16, 40)}))
    assert (text.rows, text.lengths) == ((1, 2, 4, 8, 16, 20), (8, 16, 24, 32, 40))
    assert text.shapes[-1] == (20, 40)
    assert buckets_of_profile(Profile({"batch": Extent(1, 4, 6)})).shapes == ((1, 1), (2, 1), (4, 1), (6, 1))


@pytest.mark.parametrize(("name", "modality"), TOWERS, ids=tower_id)
def test_padding_leaves_the_vectors_of_a_tower(name: str, modality: Modality, exported: Exported) -> None:
    rows = {key: array[:3] for key, array in batches_of(exported(name), modality)[-1].items()}
    buckets = text_buckets(77) if modality is Modality.TEXT else image_buckets()
    padded, n_rows = padded_to_bucket(rows, buckets)
    assert len(next(iter(padded.values()))) == 4
    backend = open_backend(
        Engine.ONNXRUNTIME, graph_of(exported(name), modality), precision=Precision.FP32, threads=1
    )
    (expected,), (found,) = backend.run(rows, ["vector"]), backend.run(padded, ["vector"])
    backend.close()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:n_rows], expected, atol=2e-6)
