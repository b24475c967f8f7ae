"""Full-size INT8 repository with random weights and front ends, for server benchmarks.

    python -m bench.models.full_size_served xlm-roberta-base-ViT-B-32 --work FOLDER

Parity of random weights cannot be checked: the manifest says so, and the model serves only to measure speed.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from runtime.backends import Engine
from runtime.manifest import Manifest, Modality, Precision

__all__ = ["served_model"]


def served_model(
    variant: str, work: Path, *, precision: Precision = Precision.INT8, engine: Engine = Engine.OPENVINO
) -> Path:
    """Return ``WORK/repository/VARIANT``, making what is missing: graphs, variant, front ends."""
    from bench.full_size import checkpoint_from_variant
    from export.checkpoint import towers_from_checkpoint
    from export.onnx_graph import onnx_from_tower
    from export.precision.calibration import CalibrationSize, calibration_from_path
    from export.publishing import publish, staging
    from export.triton.frontends import frontends_from_model
    from export.triton.tower_folders import TOKENIZER, tower_metadata, write_tower
    from export.variants import forms_for
    from runtime.manifest import Variant, manifest_path
    from runtime.preprocessing.text import Tokenizer

    repository = work / "repository"
    if manifest_path(repository / variant).is_file():
        return repository / variant
    checkpoint = work / "checkpoints" / variant
    if not checkpoint.is_dir():
        checkpoint_from_variant(variant, checkpoint)
    towers = towers_from_checkpoint(checkpoint)
    (form,) = forms_for([precision], [engine], installed=[engine])
    with staging(repository) as stage:
        (stage / TOKENIZER).write_text(towers.tokenizer_json, encoding="utf-8")
        calibration = calibration_from_path(
            None,
            Tokenizer(stage / TOKENIZER, towers.text_preprocessing),
            towers.text_preprocessing,
            towers.image_preprocessing,
            languages=towers.languages,
            size=CalibrationSize(),
        )
        written = {}
        for modality in Modality:
            source = stage / "sources" / modality.value / "model.onnx"
            source.parent.mkdir(parents=True)
            metadata = tower_metadata(towers, variant, modality)
            onnx_from_tower(
                towers, modality, source, data_name=f"{variant}_{modality.value}.data", metadata=metadata
            )
            written[modality], _ = write_tower(
                towers,
                modality,
                stage,
                name=variant,
                form=form,
                source=source,
                calibration=calibration,
                recipe=None,
            )
        made = Variant(
            precision=precision,
            engines=(engine.value,),
            text=written[Modality.TEXT],
            image=written[Modality.IMAGE],
            tokenizer=f"{written[Modality.TEXT].model}/{TOKENIZER}",
            parity={"measured": "nothing: the weights are random"},
            recipe={},
            calibration=calibration.as_json(),
            versions={},
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        manifest = Manifest(
            name=variant,
            family=towers.family,
            architecture=towers.architecture,
            dim=towers.dim,
            mrl_dims=towers.mrl_dims,
            fingerprint=towers.fingerprint,
            licence=towers.licence,
            languages=towers.languages,
            text=towers.text_preprocessing,
            image=towers.image_preprocessing,
            source=towers.source,
            variants={form.key: made},
        )
        publish(stage, repository, manifest, made)
    frontends_from_model(repository / variant)
    return repository / variant


def main(
    variant: Annotated[str, typer.Argument(help="A published variant.")],
    work: Annotated[Path, typer.Option(help="Folder for the checkpoint and the repository; some 4 GB.")],
) -> None:
    """Write a full-size INT8 repository with random weights."""
    typer.echo(served_model(variant, work))


if __name__ == "__main__":
    typer.run(main)
