"""Export every published variant at full size with random weights, and check memory and parity.

    python -m bench.full_size [VARIANT …] --work FOLDER

No network is needed: architectures come from open_clip, transformers and ``export/families/published.py``,
tokenizers from the sample checkpoints (a tower does not depend on its tokenizer's size). Each variant is
built, exported and removed in processes of its own, so that peak memory is that variant's alone.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.models.samples import CHECKPOINTS
from export.families.published import VARIANTS
from runtime.cosines import highest, lowest
from runtime.errors import BabeltowerError

__all__ = ["FullSizeResult", "checkpoint_from_variant", "in_process", "measure_variant"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
)


@dataclass(frozen=True, slots=True)
class FullSizeResult:
    """Result of one variant: sizes and memory in bytes, times in seconds, parity over both engines."""

    variant: str
    image_parameters: int
    text_parameters: int
    image_bytes: int
    text_bytes: int
    export_s: float
    peak_export_bytes: int
    min_cosine: float
    max_abs_error: float
    dims: tuple[int, ...]


def checkpoint_from_variant(name: str, folder: Path, *, samples: Path = CHECKPOINTS, seed: int = 0) -> None:
    """Write a published variant with random weights in its published format.

    Raises:
        BabeltowerError: there is no such variant.
    """
    import torch

    if name not in VARIANTS:
        raise BabeltowerError(f"{name!r} is not a published variant; known are {list(VARIANTS)}.")
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    facts = VARIANTS[name]
    if "altclip" in facts:
        _write_altclip(facts["altclip"], folder, samples)
    else:
        _write_open_clip(facts, folder, samples)


def measure_variant(name: str, work: Path) -> FullSizeResult:
    """Build, export and remove one variant, each step in a process of its own.

    Raises:
        BabeltowerError: the export failed, or parity did not hold.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=work))
    try:
        in_process(checkpoint_from_variant, name, folder / name)
        started = time.perf_counter()
        record, peak_bytes = in_process(_export, folder / name, folder / "repository")
        return FullSizeResult(
            variant=name,
            export_s=time.perf_counter() - started,
            peak_export_bytes=peak_bytes,
            **record,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _export(checkpoint: Path, repository: Path) -> dict[str, Any]:
    from export.checkpoint import towers_from_checkpoint
    from export.repository import ExportOptions, repository_from_towers

    towers = towers_from_checkpoint(checkpoint)
    counts = {
        "image_parameters": sum(p.numel() for p in towers.image.parameters()),
        "text_parameters": sum(p.numel() for p in towers.text.parameters()),
    }
    options = ExportOptions(texts_per_language=1, captions_per_language=0)
    done = repository_from_towers(towers, repository, name=checkpoint.name, options=options)
    variant = done.manifest.variants["fp32"]
    parts = [a for f in done.parity["fp32"].engines.values() for a in (f.text, f.image, *f.shapes.values())]
    return {
        **counts,
        "image_bytes": sum(record.size_bytes for record in variant.image.files),
        "text_bytes": sum(record.size_bytes for record in variant.text.files),
        "min_cosine": lowest(a.min_cosine for a in parts),
        "max_abs_error": highest(a.max_abs_error for a in parts),
        "dims": towers.dims,
    }


def _write_open_clip(facts: Mapping[str, Any], folder: Path, samples: Path) -> None:
    from safetensors.torch import save_file

    from export.families.open_clip_checkpoint import architecture_config, model_from_config, text_config_of

    config = architecture_config(facts["open_clip"])
    text_config = text_config_of(folder, str(config["text_cfg"]["hf_model_name"]))
    model = model_from_config(config, text_config)
    siglip = "timm_model_name" in config["vision_cfg"]
    half, squash = [0.5] * 3, {"interpolation": "bicubic", "resize_mode": "squash"}
    preprocess = {"mean": half, "std": half, **squash} if siglip else {}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _copy_tokenizer(samples / ("nllb-clip" if text_config["model_type"] == "m2m_100" else "capivara"), folder)
    if mrl_dims := facts.get("mrl_dims"):
        import torch

        dim = int(config["embed_dim"])
        heads = {r: torch.nn.Linear(dim, r) for r in mrl_dims}
        state = {f"model.{name}": tensor for name, tensor in state.items()}
        for r, head in heads.items():
            state |= {f"matryoshka_layer.layers.{r}.{k}": v.detach() for k, v in head.state_dict().items()}
        mrl = {
            "clip_model_name": facts["open_clip"],
            "mrl_resolutions": list(mrl_dims),
            "target_resolution": dim,
            "preprocess_cfg": {"size": config["vision_cfg"]["image_size"], **preprocess},
        }
        _write_json(folder / "config.json", mrl)
        save_file(state, folder / "model.safetensors")
        return
    _write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    save_file(state, folder / "open_clip_model.safetensors")


def _write_altclip(config: Mapping[str, Any], folder: Path, samples: Path) -> None:
    from transformers import AltCLIPConfig, AltCLIPModel

    AltCLIPModel(AltCLIPConfig.from_dict(dict(config))).save_pretrained(folder)
    _copy_tokenizer(samples / "altclip", folder)
    preprocessor = json.loads((samples / "altclip" / "preprocessor_config.json").read_text())
    size = config["vision_config"]["image_size"]
    preprocessor |= {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    _write_json(folder / "preprocessor_config.json", preprocessor)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def in_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in a fresh process; return its result and the process's peak memory in bytes."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, task, arguments))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise BabeltowerError(
            f"{task.__name__}{arguments} died with exit code {process.exitcode}: out of memory is likely."
        ) from None
    process.join()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _child(sender: Any, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = task(*arguments)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sender.send((result, peak_bytes))
    except BabeltowerError as error:
        sender.send(error)


def main(
    variants: Annotated[list[str] | None, typer.Argument(help="Published names; all by default.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, up to 15 GB; emptied after each variant.")
    ] = None,
    record: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Export published variants at full size and report parity, sizes, time and memory."""
    console = Console()
    results = []
    failures = 0
    for name in variants or list(VARIANTS):
        console.print(f"{name} …")
        try:
            results.append(measure_variant(name, work or Path(tempfile.gettempdir())))
        except BabeltowerError as error:
            failures += 1
            console.print(f"[red]{name}: {error}[/red]")
        if record is not None:
            record.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n", encoding="utf-8")
    console.print(_table(results))
    raise typer.Exit(1 if failures else 0)


def _table(results: list[FullSizeResult]) -> Table:
    columns = (
        "variant",
        "image M",
        "text M",
        "image MB",
        "text MB",
        "seconds",
        "peak GB",
        "cosine ≥",
        "error ≤",
    )
    table = Table(*columns, title="Published variants at full size, random weights, FP32")
    for r in results:
        table.add_row(
            r.variant,
            f"{r.image_parameters / 1e6:,.0f}",
            f"{r.text_parameters / 1e6:,.0f}",
            f"{r.image_bytes / 1e6:,.0f}",
            f"{r.text_bytes / 1e6:,.0f}",
            f"{r.export_s:,.0f}",
            f"{r.peak_export_bytes / 1e9:.1f}",
            f"{r.min_cosine:.8f}",
            f"{r.max_abs_error:.1e}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
