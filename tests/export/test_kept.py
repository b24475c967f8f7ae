"""Variants of an earlier export stay beside a new one only where they are proven to be of its space."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sample_models import CHECKPOINTS
from small_exports import QUICK

from export import repository_from_checkpoint, towers_from_checkpoint
from export.commands.export import record_of_export, summary_of_export
from export.kept_variants import kept_variants
from export.parity.expectations import Expectations, expected_of_reference
from export.towers import Towers
from export.variants import FP32
from runtime.manifest import Engine, Manifest, Precision, TowerFiles, manifest_path, record_of_file
from runtime.probes import Probes, probes_path

ONCE = dataclasses.replace(QUICK, forms=(dataclasses.replace(FP32, opened_by=(Engine.ONNXRUNTIME,)),))
AGAIN = dataclasses.replace(ONCE, replace=True)

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository_from_checkpoint(
        CHECKPOINTS / "capivara", tmp_path_factory.mktemp("kept") / "repository", name="m", options=ONCE
    ).model


@pytest.fixture
def published(first: Path, tmp_path: Path) -> Path:
    """REPOSITORY/NAME with a second variant, whose towers are copies of the first's."""
    repository = Path(shutil.copytree(first.parent, tmp_path / "repository"))
    manifest = Manifest.read(repository / "m")
    variant = manifest.variants["fp32"]

    def copy(tower: TowerFiles) -> TowerFiles:
        name = tower.model.replace("fp32", "fp16")
        shutil.copytree(repository / tower.model, repository / name)
        files = tuple(
            record_of_file(repository, repository / record.path.replace(tower.model, name))
            for record in tower.files
        )
        return dataclasses.replace(tower, model=name, files=files)

    second = dataclasses.replace(
        variant, precision=Precision.FP16, text=copy(variant.text), image=copy(variant.image)
    )
    second = dataclasses.replace(second, tokenizer=variant.tokenizer.replace("fp32", "fp16"))
    rewrite(repository / "m", variants={**manifest.variants, "fp16": second})
    return repository / "m"


def rewrite(model: Path, **changes: object) -> None:
    manifest = dataclasses.replace(Manifest.read(model), **changes)  # type: ignore[arg-type]
    manifest_path(model).write_text(manifest.to_json(), encoding="utf-8")


def as_former(model: Path) -> None:
    """As an older exporter left it."""
    rewrite(model, fingerprint="bt1-" + "0" * 32)
    probes = dataclasses.replace(Probes.read(model), fingerprint="bt1-" + "0" * 32)
    probes.save(probes_path(model))


def with_other_probes(model: Path) -> None:
    probes = Probes.read(model)
    vectors = probes.text_vectors.copy()
    vectors[3] = np.roll(vectors[3], 1)
    dataclasses.replace(probes, text_vectors=vectors).save(probes_path(model))


def towers_in(model: Path) -> list[str]:
    return sorted(path.name for path in model.parent.iterdir() if "_tower_" in path.name)


BOTH = ["m_image_tower_fp16", "m_image_tower_fp32", "m_text_tower_fp16", "m_text_tower_fp32"]
ONE = ["m_image_tower_fp32", "m_text_tower_fp32"]


@pytest.fixture(scope="module")
def towers() -> Towers:
    return towers_from_checkpoint(CHECKPOINTS / "capivara")


@pytest.fixture(scope="module")
def expected(towers: Towers) -> Expectations:
    return expected_of_reference(towers, 1)


@pytest.mark.parametrize("change", [lambda model: None, as_former, lambda model: probes_path(model).unlink()])
def test_a_variant_of_the_same_space_stays(
    change: Change, published: Path, towers: Towers, expected: Expectations
) -> None:
    change(published)
    manifest = Manifest.read(published)
    kept = kept_variants(manifest, published.parent, towers, expected)
    assert (kept.variants, kept.dropped) == (manifest.variants, {})


def former_of_others(model: Path) -> None:
    as_former(model)
    with_other_probes(model)


def former_without_probes(model: Path) -> None:
    as_former(model)
    probes_path(model).unlink()


def former_of_another_tokenizer(model: Path) -> None:
    as_former(model)
    path = model.parent / Manifest.read(model).variants["fp16"].tokenizer
    data = json.loads(path.read_text(encoding="utf-8"))
    data["normalizer"] = None
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: rewrite(model, fingerprint="bt2-other"), "another embedding space, bt2-other"),
        (with_other_probes, "PyTorch's vectors of its probes differ"),
        (former_of_others, "former kind.*vectors of its probes differ"),
        (former_without_probes, "former kind.*cannot be compared"),
        (former_of_another_tokenizer, "former kind.*tokenizer"),
        (lambda model: rewrite(model, fingerprint="bt1-0", mrl_dims=(64,)), "former kind.*dimensions"),
        (lambda model: rewrite(model, fingerprint="bt1-0"), "former kind.*probes belong to another export"),
    ],
)
def test_what_is_not_proven_goes(
    change: Change, reason: str, published: Path, towers: Towers, expected: Expectations
) -> None:
    change(published)
    kept = kept_variants(Manifest.read(published), published.parent, towers, expected)
    assert kept.variants == {}
    assert sorted(kept.dropped) == ["fp16", "fp32"]
    assert all(re.search(reason, why) for why in kept.dropped.values()), kept.dropped


def test_an_export_leaves_what_it_keeps_and_no_towers_that_nothing_lists(published: Path) -> None:
    (published.parent / "m_text_tower_int8_openvino").mkdir()
    others = ["m_text_tower_fp32_text_tower_fp32", "m_text_tower_int9", "n_text_tower_fp32"]
    for other in others:
        (published.parent / other).mkdir()
    done = repository_from_checkpoint(CHECKPOINTS / "capivara", published.parent, name="m", options=AGAIN)
    assert done.dropped == {"m_text_tower_int8_openvino": "no manifest lists it"}
    assert sorted(done.manifest.variants) == ["fp16", "fp32"]
    assert towers_in(published) == sorted([*BOTH, *others])


def test_an_export_removes_what_is_not_proven_and_says_so(published: Path) -> None:
    former_of_others(published)
    done = repository_from_checkpoint(CHECKPOINTS / "capivara", published.parent, name="m", options=AGAIN)
    assert sorted(done.manifest.variants) == ["fp32"]
    assert towers_in(published) == ONE
    assert sorted(p.name for p in published.parent.parent.iterdir()) == ["repository"]
    (line,) = (line for line in summary_of_export(done).splitlines() if line.startswith("removed"))
    assert re.fullmatch(
        "removed      fp16 of an earlier export: .*former kind.*vectors .* differ by .*", line
    )
    assert record_of_export(done)["dropped"] == done.dropped
