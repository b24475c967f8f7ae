"""Published variants at true size with random weights: minutes and gigabytes each."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.full_size import measure_variant
from bench.models.full_size import checkpoint_from_variant
from export.families.published import VARIANTS
from runtime.errors import BabeltowerError


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
