"""A checkpoint becomes a model of a Triton repository: written beside, compared with PyTorch, renamed."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint import towers_from_checkpoint
from export.onnx_graph import IR_VERSION, OPSET, input_names, onnx_from_tower
from export.parity import LIMITS, ParityReport, measure_parity, require_parity
from export.towers import Towers, output_name
from export.triton_config import ModelConfig, check_against_graph, tensors_of_graph
from runtime.backends import Engine
from runtime.errors import BabeltowerError, ExportError, ManifestError
from runtime.manifest import (
    FileRecord,
    Manifest,
    Modality,
    Precision,
    TowerFiles,
    Variant,
    manifest_path,
    record_of_file,
    require_name,
    tower_folder_name,
)

__all__ = ["Export", "repository_from_checkpoint", "repository_from_towers"]

MAX_BATCH_SIZE = {Modality.TEXT: 64, Modality.IMAGE: 32}

_GRAPH = "model.onnx"
_TOKENIZER = "tokenizer.json"
_REPORTED = (
    "babeltower",
    "torch",
    "transformers",
    "open_clip_torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "numpy",
)


@dataclass(frozen=True, slots=True)
class Export:
    """What was published: its path, manifest and parity, and the seconds each step took."""

    model: Path
    manifest: Manifest
    parity: ParityReport
    seconds: Mapping[str, float]


def repository_from_checkpoint(
    checkpoint: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    precision: Precision = Precision.FP32,
    base: str | Path | None = None,
    context_length: int | None = None,
    replace: bool = False,
    texts_per_language: int = 4,
) -> Export:
    """Export both towers, compare them with PyTorch, publish REPOSITORY/NAME.

    Args:
        checkpoint: Folder, ``.ckpt`` file or hub name.
        name: The checkpoint's own name by default.
        base: The checkpoint below a LoRA adapter.
        context_length: Longest text in tokens; the family's own by default.
        replace: Allow an existing variant of that name and precision to be replaced.
        texts_per_language: Names that each language is compared on, eight at most.

    Raises:
        CheckpointError: the checkpoint cannot be read faithfully.
        ExportError: the name is taken, the disk is full, or a graph could not be written.
        ParityError: the exported towers do not agree with PyTorch.

    Nothing is left half-written: the repository changes by renames, after everything was checked.
    """
    name = name or _name_of(checkpoint)
    _require_precision(precision)
    _require_free(Path(repository), name, precision, replace=replace)
    started = time.perf_counter()
    towers = towers_from_checkpoint(checkpoint, base=base, context_length=context_length)
    towers = dataclasses.replace(towers, source={"checkpoint": Path(str(checkpoint)).name, **towers.source})
    loaded = time.perf_counter() - started
    export = repository_from_towers(
        towers,
        repository,
        name=name,
        precision=precision,
        replace=replace,
        texts_per_language=texts_per_language,
    )
    return dataclasses.replace(export, seconds={"load": loaded, **export.seconds})


def repository_from_towers(
    towers: Towers,
    repository: str | Path,
    *,
    name: str,
    precision: Precision = Precision.FP32,
    replace: bool = False,
    texts_per_language: int = 4,
) -> Export:
    """Publish towers that were read before; see ``repository_from_checkpoint``."""
    repository = Path(repository)
    _require_precision(precision)
    published = _require_free(repository, name, precision, replace=replace)
    seconds: dict[str, float] = {}
    with _staging(repository) as stage:
        tower_files = {}
        for modality in Modality:
            with _timed(seconds, f"{modality.value} graph"):
                tower_files[modality] = _write_tower(towers, modality, stage, name, precision)
        variant = Variant(
            text=tower_files[Modality.TEXT],
            image=tower_files[Modality.IMAGE],
            tokenizer=f"{tower_files[Modality.TEXT].model}/{_TOKENIZER}",
            parity={},
            versions=_versions(),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        draft = _manifest(towers, name, {precision.value: variant})
        manifest_path(stage / name).write_text(draft.to_json(), encoding="utf-8")
        with _timed(seconds, "parity"):
            report = measure_parity(
                towers, stage, draft, precision, engines=_engines(), texts_per_language=texts_per_language
            )
        require_parity(report, name)
        variant = dataclasses.replace(variant, parity=report.as_json())
        manifest = _manifest(towers, name, {**_kept(published, towers), precision.value: variant})
        manifest_path(stage / name).write_text(manifest.to_json(), encoding="utf-8")
        _publish(stage, repository, manifest, precision)
    return Export(repository / name, manifest, report, seconds)


def _write_tower(
    towers: Towers, modality: Modality, stage: Path, name: str, precision: Precision
) -> TowerFiles:
    folder = stage / tower_folder_name(name, modality, precision)
    graph = folder / "1" / _GRAPH
    graph.parent.mkdir(parents=True)
    metadata = {
        "babeltower.version": importlib.metadata.version("babeltower"),
        "babeltower.name": name,
        "babeltower.family": towers.family,
        "babeltower.modality": modality.value,
        "babeltower.precision": precision.value,
        "babeltower.fingerprint": towers.fingerprint,
        "babeltower.licence": towers.licence,
    }
    onnx_from_tower(towers, modality, graph, data_name=f"{folder.name}.data", metadata=metadata)
    inputs, outputs = tensors_of_graph(graph)
    config = ModelConfig(
        name=folder.name,
        backend="onnxruntime",
        max_batch_size=MAX_BATCH_SIZE[modality],
        inputs=inputs,
        outputs=outputs,
        parameters={"babeltower_fingerprint": towers.fingerprint},
    )
    check_against_graph(config, graph)
    (folder / "config.pbtxt").write_text(config.to_pbtxt(), encoding="utf-8")
    if modality is Modality.TEXT:
        (folder / _TOKENIZER).write_text(towers.tokenizer_json, encoding="utf-8")
    return TowerFiles(
        model=folder.name,
        version=1,
        graph=_GRAPH,
        inputs=input_names(modality),
        outputs={str(dim): output_name(dim, towers.dim) for dim in towers.dims},
        opset=OPSET,
        ir_version=IR_VERSION,
        max_batch_size=config.max_batch_size,
        files=tuple(_records(stage, folder)),
    )


def _records(stage: Path, folder: Path) -> Iterator[FileRecord]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield record_of_file(stage, path)


def _manifest(towers: Towers, name: str, variants: Mapping[str, Variant]) -> Manifest:
    return Manifest(
        name=name,
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
        variants=variants,
    )


def _kept(published: Manifest | None, towers: Towers) -> Mapping[str, Variant]:
    """Variants of the same embedding space stay; of another one they would be lies."""
    if published is None or published.fingerprint != towers.fingerprint:
        return {}
    return published.variants


def _require_precision(precision: Precision) -> None:
    if precision not in LIMITS:
        raise ExportError(
            f"Precision {precision.value} has no exporter; this version exports {[p.value for p in LIMITS]}."
        )


def _require_free(repository: Path, name: str, precision: Precision, *, replace: bool) -> Manifest | None:
    """The manifest that is there already, if any.

    Raises:
        ExportError: it holds that precision, and may not be replaced.
        ManifestError: the name cannot be a model's.
    """
    require_name(name)
    if repository.exists() and not repository.is_dir():
        raise ExportError(f"{repository} is a file; a repository is a folder.")
    if not manifest_path(repository / name).is_file():
        return None
    try:
        published = Manifest.read(repository / name)
    except ManifestError:
        if replace:
            return None
        raise
    if precision.value in published.variants and not replace:
        raise ExportError(
            f"{repository} already holds {name} in {precision.value}. Pass --replace, or another --name."
        )
    return published


@contextlib.contextmanager
def _staging(repository: Path) -> Iterator[Path]:
    """A folder on the repository's disk, beside it where possible: Triton takes all inside for models."""
    made_here = not repository.exists()
    try:
        repository.mkdir(parents=True, exist_ok=True)
        parent = repository.resolve().parent
        beside = os.access(parent, os.W_OK) and parent.stat().st_dev == repository.stat().st_dev
        stage = Path(
            tempfile.mkdtemp(prefix=f".{repository.name}.staging-", dir=parent if beside else repository)
        )
    except OSError as error:
        raise ExportError(f"{repository} cannot be written: {error}.") from error
    try:
        yield stage
    except BabeltowerError:
        raise
    except OSError as error:
        free = shutil.disk_usage(repository).free
        raise ExportError(
            f"Writing to {repository} failed: {error}. {free:,} bytes are free there. Nothing was published."
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made_here and not any(repository.iterdir()):
            repository.rmdir()


def _publish(stage: Path, repository: Path, manifest: Manifest, precision: Precision) -> None:
    """Rename the towers in, then the manifest: whoever reads it finds all that it lists."""
    variant = manifest.variant(precision)
    for tower in (variant.text, variant.image):
        target = repository / tower.model
        if target.exists():
            target.rename(stage / f"replaced-{tower.model}")
        (stage / tower.model).rename(target)
    manifest_path(stage / manifest.name).replace(manifest_path(repository / manifest.name))


def _engines() -> Sequence[Engine]:
    """Every engine that is installed here: each is measured, since each may serve."""
    return [engine for engine in Engine if importlib.util.find_spec(engine.value) is not None]


def _versions() -> dict[str, str]:
    found = {}
    for package in _REPORTED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _name_of(checkpoint: str | Path) -> str:
    path = Path(str(checkpoint))
    stem = path.stem if path.suffix == ".ckpt" else path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started
