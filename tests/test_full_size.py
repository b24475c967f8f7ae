"""Published variants at true size with random weights: minutes and gigabytes each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from immich_exports import vectors_of_encoder, vectors_of_service, write_both
from nearby_checkpoints import N_TOKENS, VISION
from tiny_checkpoints import xlm_roberta

from bench.full_size import measure_variant
from bench.models import full_size
from bench.models.full_size import checkpoint_from_variant, in_process
from export.checkpoint import towers_from_checkpoint
from export.families import open_clip_checkpoint
from export.families.published import TEXT_CONFIGS, VARIANTS
from export.precision.calibration import CalibrationSize
from runtime.cosines import row_cosines
from runtime.errors import BabeltowerError
from runtime.manifest import Precision

SMALL = {
    "vocab_size": N_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 8,
    "projection_size": 16,
    "image_size": 32,
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: shrunk(value) if isinstance(value, dict) else SMALL.get(key, value)
        for key, value in config.items()
    }


def test_an_unknown_variant_is_named(tmp_path: Path) -> None:
    with pytest.raises(BabeltowerError, match="not a published variant"):
        checkpoint_from_variant("nllb-clip-huge", tmp_path)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("siglip2-base-patch16-224", "siglip2"),
        ("metaclip-2-worldwide-huge-quickgelu", "metaclip2"),
        ("XLM-Roberta-Large-Vit-B-32", "m-clip"),
    ],
)
def test_a_variant_is_written_in_its_published_format(
    name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its true size it is a slow test; here only its sizes are smaller."""
    small_text = {**xlm_roberta(), "vocab_size": N_TOKENS}
    small_image = {"embed_dim": 8, "vision_cfg": VISION}
    monkeypatch.setattr(full_size, "VARIANTS", {name: shrunk(dict(VARIANTS[name]))})
    monkeypatch.setitem(TEXT_CONFIGS, "xlm-roberta-large", small_text)  # type: ignore[arg-type]
    monkeypatch.setattr(open_clip_checkpoint, "architecture_config", lambda _: small_image)
    image_tower = checkpoint_from_variant(name, tmp_path / name)
    towers = towers_from_checkpoint(tmp_path / name, image_tower=image_tower)
    assert towers.family == family


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_variant_exports_within_memory(name: str, tmp_path: Path) -> None:
    result = measure_variant(name, tmp_path)
    assert result.min_cosine >= 0.999999
    assert result.peak_export_bytes <= 20e9
    assert result.max_fused_error <= 1e-6
    # a causal attention is not fused for CUDA yet, which the export of one says
    assert len(result.not_fused) == ("metaclip2" in VARIANTS[name])


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
