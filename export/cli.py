"""The ``babeltower`` command: the runtime's commands, and those that need the training libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runtime.cli import app
from runtime.errors import ExportError
from runtime.manifest import Precision

if TYPE_CHECKING:
    from export.parity import Agreement
    from export.repository import Export

__all__ = ["app", "main"]


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder, .ckpt file or hub name of a trained model.")
    ],
    repository: Annotated[
        Path, typer.Argument(metavar="REPOSITORY", help="Triton model repository; made if it is not there.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the model; the checkpoint's own by default.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the matrix products.")] = Precision.FP32,
    base: Annotated[str | None, typer.Option(help="Checkpoint below a LoRA adapter.")] = None,
    context_length: Annotated[
        int | None, typer.Option(min=4, help="Longest text in tokens; the family's own (77) by default.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a variant that is there.")] = False,
    texts_per_language: Annotated[
        int, typer.Option(min=1, max=8, help="Names that each language is compared on.")
    ] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export both towers, compare them with PyTorch, publish REPOSITORY/NAME.

    Exit code 0 means that parity was measured and held, and that the model is published.
    """
    try:
        from export.repository import repository_from_checkpoint
    except ModuleNotFoundError as error:
        raise ExportError(
            f"Exporting needs {error.name}, which is not installed. Run: pip install 'babeltower[export]'"
        ) from error
    done = repository_from_checkpoint(
        checkpoint,
        repository,
        name=name,
        precision=precision,
        base=base,
        context_length=context_length,
        replace=replace,
        texts_per_language=texts_per_language,
    )
    typer.echo(json.dumps(_record(done), ensure_ascii=False) if as_json else _summary(done))


def main() -> None:
    """Entry point of the ``babeltower`` command."""
    app()


def _record(done: Export) -> dict[str, object]:
    return {
        "model": str(done.model),
        "fingerprint": done.manifest.fingerprint,
        "family": done.manifest.family,
        "dims": [done.manifest.dim, *done.manifest.mrl_dims],
        "parity": done.parity.as_json(),
        "seconds": {step: round(seconds, 2) for step, seconds in done.seconds.items()},
    }


def _summary(done: Export) -> str:
    manifest, parity = done.manifest, done.parity
    variant = manifest.variant(Precision(parity.precision))
    size = sum(record.size_bytes for tower in (variant.text, variant.image) for record in tower.files)
    lines = [
        f"published    {done.model}",
        f"model        {manifest.family}, {manifest.architecture}",
        f"vectors      {manifest.dim} wide"
        + (f", MRL heads {list(manifest.mrl_dims)}" if manifest.mrl_dims else ""),
        f"precision    {parity.precision}, {size / 1e6:,.1f} MB on disk",
        f"fingerprint  {manifest.fingerprint}",
        f"reference    {parity.reference}",
        f"compared     {parity.n_texts} texts, {parity.n_images} images; token ids equal; "
        f"pixels within {parity.max_pixel_error * 255:.2f}/255",
    ]
    for engine, figures in parity.engines.items():
        language, worst = min(figures.languages.items(), key=lambda item: item[1].min_cosine)
        lines += [
            f"{engine}",
            f"  text       {_agreement(figures.text)}",
            f"  image      {_agreement(figures.image)}",
            f"  languages  {len(figures.languages)}; worst {language} at cosine {worst.min_cosine:.8f}",
            f"  alone      a text alone and in a batch differ by ≤ {figures.row_alone:.1e}",
        ]
    lines.append(
        "seconds      " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in done.seconds.items())
    )
    return "\n".join(lines)


def _agreement(measured: Agreement) -> str:
    return f"cosine ≥ {measured.min_cosine:.8f}, error ≤ {measured.max_abs_error:.1e}"


if __name__ == "__main__":
    main()
