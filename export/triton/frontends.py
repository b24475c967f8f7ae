"""Front ends of a model: Triton models that take strings and image files and call the towers.

A front end's version folder is self-contained: settings, tokenizer, code, and the part of ``runtime`` that it
shares with the in-process encoder. ``NAME_text`` and ``NAME_image`` serve one variant of NAME; writing them
again for another variant replaces them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path

from export.triton.config import InstanceGroup, ModelConfig, QueuePolicy, TensorConfig
from export.triton.tower_config import TowerSettings, resettled
from export.triton.vendoring import code_of_module
from runtime.errors import ManifestError
from runtime.manifest import (
    FRONT_END_FILE,
    GPU_ENGINES,
    TOKENIZER_FILE,
    Engine,
    FrontEnds,
    Manifest,
    Modality,
    TowerFiles,
    Variant,
    front_end_name,
    manifest_path,
    record_of_file,
)
from runtime.repository import commit, staging, variant_with_configs
from runtime.triton_config import CONFIG_FILE, engine_of_tower
from triton_models.spec import (
    ImageLimits,
    ImageSpec,
    TextLimits,
    TextSpec,
    TowerCall,
    parameters_from_limits,
)

__all__ = ["FrontEndSettings", "frontends_from_model", "write_front_ends"]


@dataclass(frozen=True, slots=True)
class FrontEndSettings:
    """Serving settings of the front ends; the defaults suit a machine whose cores also run the towers.

    Attributes:
        max_batch_size: Maximum rows per batch, by modality; by default the tower's on a GPU, and larger ones
            than the tower's on a CPU, which are split by length.
        max_queue_delay_us: Maximum delay of a request to fill a batch. With 0, requests that arrive while a
            batch is computed form the next batch.
        instances: Processes per front end; with two, one tokenizes while the other waits for the tower.
        queue: 1,024 queued requests, each for 60 s at most (a client may set less), with two priorities:
            requests of priority 2 (bulk indexing) wait for those of priority 1, the default.
        token_budget: Replaces that of ``text``.
        text: Limits of the text front end; by default those for the tower's device.
    """

    max_batch_size: Mapping[Modality, int] = field(default_factory=dict)
    max_queue_delay_us: int = 0
    instances: int = 2
    queue: QueuePolicy = field(
        default_factory=lambda: QueuePolicy(max_size=1024, timeout_ms=60_000, priority_levels=2)
    )
    token_budget: int | None = None
    text: TextLimits | None = None
    image: ImageLimits = field(default_factory=ImageLimits)


def frontends_from_model(
    model: str | os.PathLike[str],
    *,
    variant: str | None = None,
    settings: FrontEndSettings | None = None,
    towers: TowerSettings | None = None,
) -> tuple[Path, Path]:
    """Write the front ends of ``REPOSITORY/NAME`` into its repository.

    Args:
        variant: Key of the variant in the manifest; optional if there is only one.
        towers: New serving settings of the variant's towers; unchanged if None.

    Returns:
        Folders of the text and the image front end.

    Raises:
        ManifestError: the model or variant does not exist.
        ExportError: the folders cannot be written, or the engine does not support the towers' settings.
            Nothing is left half-written.
    """
    repository = Path(model).parent
    manifest = Manifest.read(model)
    key = _variant_key(manifest, variant)
    with staging(repository, "frontends") as stage:
        manifest = Manifest.read(model)
        folders = write_front_ends(manifest, key, repository, stage, settings or FrontEndSettings())
        records = [
            record_of_file(stage, path)
            for folder in folders
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        text, image = (folder.name for folder in folders)
        variants = dict(manifest.variants)
        moves = {folder: repository / folder.name for folder in folders}
        if towers is not None:
            drafts = stage / "drafts"
            moves |= _resettled_towers(variants[key], repository, drafts, towers)
            variants[key] = variant_with_configs(variants[key], repository, drafts)
        served = FrontEnds(key, text, image, tuple(records))
        written = dataclasses.replace(manifest, variants=variants, front_ends=(served,), kept=())
        draft = stage / "manifest.json"
        draft.write_text(written.to_json(), encoding="utf-8")
        commit(
            stage,
            repository,
            manifest.name,
            "writing of the front ends",
            {**moves, draft: manifest_path(model)},
        )
    return repository / text, repository / image


def write_front_ends(
    manifest: Manifest, key: str, repository: Path, stage: Path, settings: FrontEndSettings
) -> tuple[Path, Path]:
    """Write both front ends of a variant to ``stage``; its towers are in ``repository``.

    Raises:
        ExportError: a configuration does not parse back to the same values.
    """
    variant = manifest.variants[key]
    on_gpu = engine_of_tower(repository, variant.text) in GPU_ENGINES
    limits = settings.text or (TextLimits.on_gpu() if on_gpu else TextLimits())
    if settings.token_budget is not None:
        limits = dataclasses.replace(limits, token_budget=settings.token_budget)
    text = _write(manifest, key, repository, stage, Modality.TEXT, settings, parameters_from_limits(limits))
    image = _write(
        manifest, key, repository, stage, Modality.IMAGE, settings, parameters_from_limits(settings.image)
    )
    shutil.copyfile(repository / variant.tokenizer, text / "1" / TOKENIZER_FILE)
    return text, image


def _write(
    manifest: Manifest,
    key: str,
    repository: Path,
    stage: Path,
    modality: Modality,
    settings: FrontEndSettings,
    limits: Mapping[str, str],
) -> Path:
    folder = stage / front_end_name(manifest.name, modality)
    version = folder / "1"
    version.mkdir(parents=True)
    tower = manifest.variants[key].tower(modality)
    engine = engine_of_tower(repository, tower)
    on_gpu = engine in GPU_ENGINES
    parameters = {**_facts(manifest, key, tower, engine), **limits}
    rows = settings.max_batch_size.get(modality, tower.max_batch_size if on_gpu else _ROWS[modality])
    config = _config(manifest.name, modality, settings, rows, parameters)
    (folder / CONFIG_FILE).write_text(config.to_pbtxt(), encoding="utf-8")
    call = TowerCall(tower.model, tower.version, tower.max_batch_size, manifest.dim, tower.outputs, on_gpu)
    spec = TextSpec(call, manifest.text) if modality is Modality.TEXT else ImageSpec(call, manifest.image)
    (version / FRONT_END_FILE).write_text(
        json.dumps(dataclasses.asdict(spec), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    _copy_code(modality, version)
    return folder


_ROWS = {Modality.TEXT: 256, Modality.IMAGE: 64}
"""Maximum rows per batch of a front end whose tower runs on a CPU."""


def _config(
    name: str, modality: Modality, settings: FrontEndSettings, rows: int, parameters: Mapping[str, str]
) -> ModelConfig:
    dim = TensorConfig("dim", "TYPE_INT32", (1,), optional=True)
    vector = TensorConfig("vector", "TYPE_FP32", (-1,))
    inputs: tuple[TensorConfig, ...]
    if modality is Modality.TEXT:
        inputs = (
            TensorConfig("text", "TYPE_STRING", (1,)),
            TensorConfig("language", "TYPE_STRING", (1,), optional=True),
            dim,
        )
        outputs: tuple[TensorConfig, ...] = (vector, TensorConfig("truncated", "TYPE_BOOL", (1,)))
    else:
        inputs = (TensorConfig("image", "TYPE_STRING", (1,)), dim)
        outputs = (vector,)
    return ModelConfig(
        name=front_end_name(name, modality),
        backend="python",
        filename="model.py",
        max_batch_size=rows,
        inputs=inputs,
        outputs=outputs,
        max_queue_delay_us=settings.max_queue_delay_us,
        instances=InstanceGroup(settings.instances),
        queue=settings.queue,
        parameters=parameters,
    )


def _facts(manifest: Manifest, key: str, tower: TowerFiles, engine: Engine) -> dict[str, str]:
    dims = sorted({*manifest.mrl_dims, manifest.dim})
    return {
        "babeltower_name": manifest.name,
        "babeltower_fingerprint": manifest.fingerprint,
        "babeltower_variant": key,
        "babeltower_precision": manifest.variants[key].precision.value,
        "babeltower_engine": engine.value,
        "babeltower_dim": str(manifest.dim),
        "babeltower_dims": ",".join(map(str, dims)),
        "babeltower_tower": tower.model,
    }


def _resettled_towers(
    variant: Variant, repository: Path, drafts: Path, settings: TowerSettings
) -> dict[Path, Path]:
    """Write the towers' new configurations to ``drafts``; return the target path of each draft."""
    found = {}
    for modality in Modality:
        target = repository / variant.tower(modality).model / CONFIG_FILE
        draft = drafts / variant.tower(modality).model / CONFIG_FILE
        config = resettled(target.read_text(encoding="utf-8"), variant.precision, settings)
        draft.parent.mkdir(parents=True)
        draft.write_text(config, encoding="utf-8")
        found[draft] = target
    return found


def _copy_code(modality: Modality, version: Path) -> None:
    """Copy ``model.py`` and all project modules that it imports, directly or indirectly."""
    with as_file(files("triton_models") / modality.value / "model.py") as entry:
        shutil.copyfile(entry, version / "model.py")
    for module in code_of_module(version / "model.py"):
        package, _, path = module.partition("/")
        target = version / module
        target.parent.mkdir(parents=True, exist_ok=True)
        with as_file(files(package) / path) as source:
            shutil.copyfile(source, target)


def _variant_key(manifest: Manifest, variant: str | None) -> str:
    if variant is None and len(manifest.variants) == 1:
        return next(iter(manifest.variants))
    if variant is None:
        raise ManifestError(
            f"{manifest.name!r} has the variants {sorted(manifest.variants)}; choose one with --variant "
            "(variant=)."
        )
    if variant not in manifest.variants:
        raise ManifestError(
            f"{manifest.name!r} has no variant {variant!r}; choose one of {sorted(manifest.variants)}."
        )
    return variant
