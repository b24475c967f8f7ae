"""Published variants at true size with random weights: minutes and gigabytes each."""

from __future__ import annotations

from pathlib import Path

import pytest
from immich_exports import vectors_of_encoder, vectors_of_service, write_both

from bench.full_size import measure_variant
from bench.models.full_size import checkpoint_from_variant, in_process
from export.checkpoint import towers_from_checkpoint
from export.families.published import VARIANTS
from export.precision.calibration import CalibrationSize
from runtime.cosines import row_cosines
from runtime.errors import BabeltowerError
from runtime.manifest import Precision


def test_an_unknown_variant_is_named(tmp_path: Path) -> None:
    with pytest.raises(BabeltowerError, match="not a published variant"):
        checkpoint_from_variant("nllb-clip-huge", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_variant_exports_within_memory(name: str, tmp_path: Path) -> None:
    result = measure_variant(name, tmp_path)
    assert result.min_cosine >= 0.99999
    assert result.peak_export_bytes <= 20e9
    assert result.max_fused_error <= 1e-6


def _in_both_forms(checkpoint: Path, work: Path) -> tuple[Path, Path]:
    towers = towers_from_checkpoint(checkpoint)
    return write_both(towers, work, None, Precision.FP32, CalibrationSize())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nllb-clip-base-siglip", "nllb-clip-large-siglip"])
def test_immich_computes_the_vectors_of_the_encoder_at_true_size(name: str, tmp_path: Path) -> None:
    in_process(checkpoint_from_variant, name, tmp_path / name)
    (folder, model), _ = in_process(_in_both_forms, tmp_path / name, tmp_path)
    assert folder.name == f"{name}__v1"
    found, _ = in_process(vectors_of_service, folder)
    wanted, _ = in_process(vectors_of_encoder, model, Precision.FP32)
    for ours, theirs in zip(found, wanted, strict=True):
        assert row_cosines(ours, theirs).min() >= 0.999999
