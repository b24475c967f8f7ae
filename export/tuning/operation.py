"""Read and write the serving settings of a front end and its tower in their ``config.pbtxt``."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.triton.tower_config import TowerSettings, engine_of_config, resettle, settings_of_config
from runtime.errors import ExportError
from runtime.manifest import GRAPH_ENGINES, Manifest, Modality, Precision, manifest_path
from runtime.repository import commit, staging, with_config_records
from runtime.triton_config import CONFIG_FILE, config_of_folder, configuration_messages, write_config
from triton_models.spec import ImageLimits, TextLimits

__all__ = [
    "ServingSettings",
    "TunedFiles",
    "operation_of_model",
    "publish_operation",
    "tuned_files",
    "write_operation",
]

_PREFIX = "babeltower_"


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """Serving settings that affect speed but not results.

    Attributes:
        tower_instances: Number of tower instances, each with its own weights in memory.
        tower_threads: Threads per tower instance; 0 lets the engine use all cores.
        front_instances: Number of front-end processes.
        max_queue_delay_us: Maximum delay of a request to fill a batch.
        max_batch_size: Maximum rows per batch of the front end.
        token_budget, bucket_overhead: See ``TextLimits``; 0 for images.
        decode_threads: See ``ImageLimits``; 0 for texts.
    """

    tower_instances: int
    tower_threads: int
    front_instances: int
    max_queue_delay_us: int
    max_batch_size: int
    token_budget: int = 0
    bucket_overhead: int = 0
    decode_threads: int = 0

    def __str__(self) -> str:
        threads = self.tower_threads or "all"
        words = [
            f"tower {self.tower_instances}×{threads}",
            f"front {self.front_instances}",
            f"delay {self.max_queue_delay_us}",
            f"batch {self.max_batch_size}",
        ]
        if self.token_budget:
            words += [f"budget {self.token_budget}", f"overhead {self.bucket_overhead}"]
        if self.decode_threads:
            words.append(f"decode {self.decode_threads}")
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class TunedFiles:
    """Triton models to tune: a front end and its tower."""

    modality: Modality
    engine: str
    front: str
    tower: str
    precision: Precision


def tuned_files(model: Path, manifest: Manifest, modality: Modality) -> TunedFiles:
    """Return the front end of a modality of ``REPOSITORY/NAME`` and its tower.

    Raises:
        ExportError: the model has no front ends, or its engine cannot be tuned.
    """
    if not manifest.front_ends:
        raise ExportError(
            f"{manifest.name} has no front ends to tune. Write them with "
            f"`babeltower frontends {shlex.quote(str(model))}`."
        )
    (served,) = manifest.front_ends
    variant = manifest.variants[served.variant]
    tower = variant.tower(modality).model
    engine = engine_of_config(config_of_folder(model.parent / tower)).value
    known = [key.value for key in GRAPH_ENGINES]
    if engine not in known:
        raise ExportError(
            f"{manifest.name} serves the variant {served.variant}, which runs on {engine!r}. Tuning runs a "
            f"server on the CPU and supports only {known}. Write the front ends for such a variant with "
            f"`babeltower frontends {shlex.quote(str(model))} --variant ...`."
        )
    front = served.text if modality is Modality.TEXT else served.image
    return TunedFiles(modality, engine, front, tower, variant.precision)


def operation_of_model(repository: Path, files: TunedFiles) -> ServingSettings:
    """Read the serving settings of both models.

    Raises:
        ExportError: one is missing or malformed.
    """
    front, tower = config_of_folder(repository / files.front), config_of_folder(repository / files.tower)
    settings = settings_of_config(tower)
    limits = TextLimits() if files.modality is Modality.TEXT else ImageLimits()
    given = {**dataclasses.asdict(limits), **_given(front)}
    names = ("token_budget", "bucket_overhead", "decode_threads")
    return ServingSettings(
        tower_instances=settings.instances,
        tower_threads=settings.threads or 0,
        front_instances=_instances(front),
        max_queue_delay_us=front.dynamic_batching.max_queue_delay_microseconds,
        max_batch_size=front.max_batch_size,
        **{name: int(given[name]) for name in names if name in given},
    )


def write_operation(repository: Path, files: TunedFiles, operation: ServingSettings) -> None:
    """Write the serving settings of both models, each atomically; the manifest is not updated.

    Raises:
        ExportError: the files cannot be written, or do not read back as the same settings.
    """
    front, tower = config_of_folder(repository / files.front), config_of_folder(repository / files.tower)
    settings = TowerSettings(operation.tower_instances, operation.tower_threads or None)
    resettle(tower, files.precision, settings)
    _set_instances(front, operation.front_instances)
    front.dynamic_batching.max_queue_delay_microseconds = operation.max_queue_delay_us
    front.max_batch_size = operation.max_batch_size
    for name in ("token_budget", "bucket_overhead", "decode_threads"):
        value = getattr(operation, name)
        if value:
            front.parameters[_PREFIX + name].string_value = str(value)
    try:
        for folder, config in ((files.front, front), (files.tower, tower)):
            write_config(repository / folder, config)
    except OSError as error:
        raise ExportError(f"The configurations in {repository} cannot be written: {error}.") from error
    if (found := operation_of_model(repository, files)) != operation:
        raise ExportError(f"{repository / files.front} reads back as {found}; expected {operation}.")


def publish_operation(model: Path, files: TunedFiles, operation: ServingSettings) -> None:
    """Write the serving settings of ``REPOSITORY/NAME``, and the manifest with the new checksums, as one.

    Raises:
        ExportError: the files cannot be written, or do not read back as the same settings.
        RepositoryInUseError: another command changes the repository.
    """
    repository = model.parent
    with staging(repository, "tune") as stage:
        drafts = stage / "operation"
        configs = [Path(folder) / CONFIG_FILE for folder in (files.front, files.tower)]
        for config in configs:
            (drafts / config).parent.mkdir(parents=True)
            shutil.copyfile(repository / config, drafts / config)
        write_operation(drafts, files, operation)
        draft = drafts / "manifest.json"
        manifest = with_config_records(Manifest.read(model), repository, drafts)
        draft.write_text(manifest.to_json(), encoding="utf-8")
        moves = {drafts / config: repository / config for config in configs}
        commit(stage, repository, manifest.name, "tuning", {**moves, draft: manifest_path(model)})


def _given(config: Any) -> Mapping[str, str]:
    return {key.removeprefix(_PREFIX): value.string_value for key, value in config.parameters.items()}


def _instances(config: Any) -> int:
    return int(max(1, sum(group.count for group in config.instance_group)))


def _set_instances(config: Any, count: int) -> None:
    cpu = configuration_messages().ModelInstanceGroup.KIND_CPU
    del config.instance_group[:]
    config.instance_group.add(count=count, kind=cpu)
