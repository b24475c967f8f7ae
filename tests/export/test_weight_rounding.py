"""Weights as codes: within their limit, and compensated so that products of real inputs err less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from numpy.typing import NDArray
from precision_models import batches_of, graph_of
from sample_models import Exported

from export.graphs.folding import fold
from export.graphs.matrix_products import products
from export.precision import input_moments as moments_module
from export.precision.input_moments import input_moments
from export.precision.weight_rounding import FULL_CODE, PORTABLE_CODE, rounded_weight
from runtime.manifest import Modality

N_INPUTS, N_OUTPUTS = 48, 20


def correlated_inputs(seed: int, *, draw: int = 0) -> NDArray[np.float32]:
    """Rows of one distribution that move together, as activations do; the last input is always 0."""
    mixing = np.random.default_rng(seed).standard_normal((8, N_INPUTS))
    random = np.random.default_rng([seed, draw])
    rows = random.standard_normal((400, 8)) @ mixing
    rows += 0.1 * random.standard_normal(rows.shape)
    rows[:, -1] = 0
    return rows.astype(np.float32)


def weight_of(seed: int) -> NDArray[np.float32]:
    weight = np.random.default_rng(seed).standard_normal((N_INPUTS, N_OUTPUTS)).astype(np.float32)
    weight[:, 3] = 0
    return weight


def error(rows: NDArray[np.float32], weight: NDArray[np.float32], codes: NDArray[np.int8], scales) -> float:
    return float(np.square(rows @ (codes * scales - weight)).mean())


@pytest.mark.parametrize("largest_code", [7, PORTABLE_CODE, FULL_CODE])
@pytest.mark.parametrize("seed", range(4))
def test_compensation_errs_less_on_inputs_that_it_has_not_seen(seed: int, largest_code: int) -> None:
    seen, unseen, weight = correlated_inputs(seed), correlated_inputs(seed, draw=1), weight_of(seed)
    moments = (seen.T @ seen).astype(np.float64)
    nearest = rounded_weight(weight, 1, largest_code=largest_code)
    found = rounded_weight(weight, 1, largest_code=largest_code, moments=moments)
    np.testing.assert_array_equal(found.scales, nearest.scales)
    assert np.abs(found.codes.astype(int)).max() <= largest_code
    assert not found.codes[:, 3].any()
    before = error(unseen, weight, nearest.codes, nearest.scales)
    assert error(unseen, weight, found.codes, found.scales) < 0.5 * before


def test_the_axis_of_the_outputs_may_be_the_first() -> None:
    rows, weight = correlated_inputs(0), weight_of(0)
    moments = (rows.T @ rows).astype(np.float64)
    by_column = rounded_weight(weight, -1, largest_code=PORTABLE_CODE, moments=moments)
    by_row = rounded_weight(weight.T.copy(), 0, largest_code=PORTABLE_CODE, moments=moments)
    np.testing.assert_array_equal(by_row.codes.T, by_column.codes)
    np.testing.assert_array_equal(by_row.scales, by_column.scales)


def test_inputs_that_do_not_move_together_are_rounded_to_the_nearest() -> None:
    weight = weight_of(1)
    found = rounded_weight(weight, 1, largest_code=PORTABLE_CODE, moments=np.eye(N_INPUTS))
    nearest = rounded_weight(weight, 1, largest_code=PORTABLE_CODE)
    np.testing.assert_array_equal(found.codes, nearest.codes)


def test_inputs_that_are_all_zero_change_nothing() -> None:
    weight = weight_of(2)
    found = rounded_weight(weight, 1, largest_code=PORTABLE_CODE, moments=np.zeros((N_INPUTS, N_INPUTS)))
    nearest = rounded_weight(weight, 1, largest_code=PORTABLE_CODE)
    np.testing.assert_array_equal(found.codes, nearest.codes)


@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_moments_are_those_of_the_tokens_alone(
    group_bytes: int, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding a batch further, or gathering in several passes, moves no moment."""
    monkeypatch.setattr(moments_module, "_GROUP_BYTES", group_bytes)
    model_path = exported("nllb-clip")
    source = graph_of(model_path, Modality.TEXT)
    model = onnx_ir.load(source)
    fold(model)
    named = [str(node.inputs[0].name) for node in products(model) if node.inputs[1].is_initializer()]
    tensors = dict.fromkeys(named[:6], lambda rows: rows)
    batch = batches_of(model_path, Modality.TEXT)[-1]
    wider = {
        "input_ids": np.pad(batch["input_ids"], ((0, 0), (0, 5)), constant_values=1),
        "attention_mask": np.pad(batch["attention_mask"], ((0, 0), (0, 5))),
    }
    folder = Path(source).parent
    narrow, wide = (dict(input_moments(model, folder, tensors, [b, b])) for b in (batch, wider))
    once = dict(input_moments(model, folder, tensors, [batch]))
    assert list(narrow) == list(dict.fromkeys(named[:6]))
    for name, found in narrow.items():
        np.testing.assert_allclose(found, 2 * once[name], rtol=1e-6)
        np.testing.assert_allclose(found, wide[name], atol=1e-4 * np.abs(found).max())
        assert np.linalg.eigvalsh(found).min() > -1e-3 * np.abs(found).max()
