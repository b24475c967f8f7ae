"""Write a tower's ``config.pbtxt`` with the parameters of its Triton backend.

Source: the backends' code as of Triton 26.06: ``src/onnxruntime.cc`` of onnxruntime_backend,
``src/openvino.cc`` of openvino_backend, ``src/model_state.cc`` of tensorrt_backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from export.triton.config import (
    InstanceGroup,
    ModelConfig,
    TensorConfig,
    Warmup,
    WarmupInput,
    tensors_of_graph,
)
from export.triton.warmup import plan_instances, plan_warmups
from runtime.errors import ExportError
from runtime.manifest import Engine, Precision
from runtime.triton_config import config_from_text, text_from_config

__all__ = [
    "BackendSettings",
    "Device",
    "TowerSettings",
    "operation_of_tower",
    "resettle",
    "resettled",
    "settings_of_config",
    "tower_config",
]

WARMUP_FOLDER = "warmup"
_TEXT_SHAPES = ((32, 16), (8, 32), (8, 16), (8, 8), (1, 32), (1, 16), (1, 8))
"""Warm-up shapes, rows × tokens, typical of captions, the largest first: 1,000 tokens, 200 GFLOP of XLM-R
base in all."""

_IMAGE_ROWS = (8, 1)
_OURS = "babeltower_"
"""Prefix of the parameters that describe a tower; the others are serving settings."""


class Device(str, Enum):
    """Device of a tower's instances."""

    CPU = "cpu"
    GPU = "gpu"


@dataclass(frozen=True, slots=True)
class TowerSettings:
    """Serving settings of a tower.

    Attributes:
        instances: Number of requests computed concurrently.
        threads: Threads per instance; None lets a single instance use all cores.
        device: Device to run on; TensorRT plans always run on a GPU.
    """

    instances: int = 1
    threads: int | None = None
    device: Device = Device.CPU

    def __post_init__(self) -> None:
        if self.instances < 1 or (self.threads is not None and self.threads < 1):
            raise ExportError(
                f"instances is {self.instances} and threads {self.threads}; expected at least 1 of each."
            )


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """Serving settings as ``config.pbtxt`` blocks of a backend."""

    instances: InstanceGroup
    parameters: Mapping[str, str] = field(default_factory=dict)
    cuda: Mapping[str, str] = field(default_factory=dict)


def operation_of_tower(engine: Engine, precision: Precision, settings: TowerSettings) -> BackendSettings:
    """Translate serving settings to the parameters of an engine's backend.

    Raises:
        ExportError: the engine does not support the settings.
    """
    if engine is Engine.TENSORRT:
        if settings.threads is not None:
            raise ExportError("TensorRT plans run on a GPU and have no threads setting; leave threads out.")
        return BackendSettings(InstanceGroup(settings.instances, "KIND_GPU"))
    if settings.device is Device.GPU:
        return _onnxruntime_on_gpu(engine, precision, settings)
    instances = InstanceGroup(settings.instances, "KIND_CPU")
    if engine is Engine.ONNXRUNTIME:
        # Shapes change with every batch, and ONNX Runtime would cache a memory pattern for each.
        parameters = {"enable_mem_pattern": "0"}
        if settings.threads is not None:
            parameters["intra_op_thread_count"] = str(settings.threads)
        return BackendSettings(instances, parameters)
    return BackendSettings(instances, _openvino_parameters(precision, settings))


def _onnxruntime_on_gpu(engine: Engine, precision: Precision, settings: TowerSettings) -> BackendSettings:
    if engine is not Engine.ONNXRUNTIME or precision not in (Precision.FP32, Precision.FP16):
        raise ExportError(
            f"{precision.value} for {engine.value} does not run on a GPU; export it with --engine tensorrt."
        )
    # The CUDA provider rounds operands of FP32 products to TF32 by default.
    return BackendSettings(InstanceGroup(settings.instances, "KIND_GPU"), cuda={"use_tf32": "0"})


def _openvino_parameters(precision: Precision, settings: TowerSettings) -> dict[str, str]:
    parameters = {}
    if precision is Precision.BF16:
        parameters["HINT_BF16"] = "YES"
    if settings.instances == 1:
        parameters["PERFORMANCE_HINT"] = "LATENCY"
    else:
        parameters["NUM_STREAMS"] = str(settings.instances)
    if settings.threads is not None:  # OpenVINO's setting is the total of all instances
        parameters["INFERENCE_NUM_THREADS"] = str(settings.threads * settings.instances)
    return parameters


def tower_config(
    folder: Path,
    graph: Path,
    *,
    engine: Engine,
    precision: Precision,
    fingerprint: str,
    max_batch_size: int,
    context_length: int,
    plan: Path | None = None,
    settings: TowerSettings | None = None,
) -> ModelConfig:
    """Return the configuration of a tower, and write its warm-up tensors to ``folder/warmup``.

    Args:
        folder: Folder of the Triton model, which has its name.
        graph: ONNX file that defines the inputs and outputs.
        engine: Engine whose Triton backend runs the tower.
        context_length: Maximum text length in tokens.
        plan: TensorRT plan to open in place of the graph.

    Raises:
        ExportError: the graph's tensors are not supported, or the engine does not support the settings.
    """
    # With max_batch_size > 0 the openvino backend compiles for that fixed batch: all requests must have it.
    batched = engine is not Engine.OPENVINO
    inputs, outputs = tensors_of_graph(graph, batched=batched)
    operation = operation_of_tower(engine, precision, settings or TowerSettings())
    warmups = (
        tuple(_warmups(inputs, folder, context_length, batched=batched))
        if plan is None
        else plan_warmups(plan, folder)
    )
    return ModelConfig(
        name=folder.name,
        backend=engine.value,
        platform="" if plan is None else "tensorrt_plan",
        filename=graph.name if plan is None else plan.name,
        max_batch_size=max_batch_size if batched else 0,
        batches=batched and not _takes_text(inputs),
        inputs=inputs,
        outputs=outputs,
        instances=operation.instances if plan is None else plan_instances(plan, operation.instances.count),
        parameters={"babeltower_fingerprint": fingerprint, **operation.parameters},
        cuda=operation.cuda,
        warmups=warmups,
    )


def resettled(config: str, precision: Precision, settings: TowerSettings) -> str:
    """Return a tower's ``config.pbtxt`` with new serving settings; everything else is unchanged.

    Raises:
        ExportError: its backend cannot be operated so, or instances would share the cores.
        ManifestError: it does not parse.
    """
    if settings.instances > 1 and settings.threads is None and settings.device is Device.CPU:
        raise ExportError(
            f"{settings.instances} instances would each use all cores; pass the threads of each."
        )
    parsed = config_from_text(config, origin="The tower's config.pbtxt")
    resettle(parsed, precision, settings)
    return text_from_config(parsed)


def resettle(config: Any, precision: Precision, settings: TowerSettings) -> None:
    """Apply serving settings to a parsed ``inference.ModelConfig``, in place.

    Raises:
        ExportError: it does not belong to a tower, or its backend does not support the settings.
    """
    operation = operation_of_tower(_engine_of_config(config), precision, settings)
    profiles = [profile for group in config.instance_group for profile in group.profile]
    del config.instance_group[:]
    group = config.instance_group.add(count=operation.instances.count, profile=profiles)
    group.kind = type(group).Kind.Value(operation.instances.kind)
    for key in [key for key in config.parameters if not key.startswith(_OURS)]:
        del config.parameters[key]
    for key, value in operation.parameters.items():
        config.parameters[key].string_value = value
    config.ClearField("optimization")
    if operation.cuda:
        cuda = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        cuda.parameters.update(operation.cuda)


def settings_of_config(config: Any) -> TowerSettings:
    """Read the serving settings from a parsed tower configuration.

    Raises:
        ExportError: it does not belong to a tower.
    """
    groups = config.instance_group
    instances = max(1, sum(group.count for group in groups))
    on_gpu = any(group.kind == group.KIND_GPU for group in groups)
    if _engine_of_config(config) is Engine.OPENVINO:
        threads = _whole(config, "INFERENCE_NUM_THREADS") // instances
    else:
        threads = _whole(config, "intra_op_thread_count")
    return TowerSettings(instances, threads or None, Device.GPU if on_gpu else Device.CPU)


def _engine_of_config(config: Any) -> Engine:
    try:
        return Engine(config.backend)
    except ValueError:
        raise ExportError(
            f"This is not a tower's config.pbtxt: its backend is {config.backend!r}. Export the checkpoint "
            "again."
        ) from None


def _whole(config: Any, key: str) -> int:
    return int(config.parameters[key].string_value or 0) if key in config.parameters else 0


def _warmups(
    inputs: tuple[TensorConfig, ...], folder: Path, context_length: int, *, batched: bool
) -> Iterator[Warmup]:
    """Yield warm-up requests of common shapes; token ids and masks are all 1, pixels all 0."""
    if not _takes_text(inputs):
        for rows in _IMAGE_ROWS:
            shape = {t.name: t.dims if batched else (rows, *t.dims[1:]) for t in inputs}
            tensors = tuple(WarmupInput(t.name, t.data_type, shape[t.name]) for t in inputs)
            yield Warmup(f"{rows} images", rows if batched else 1, tensors)
        return
    (folder / WARMUP_FOLDER).mkdir(exist_ok=True)
    shapes = ((rows, min(tokens, context_length)) for rows, tokens in (*_TEXT_SHAPES, (1, context_length)))
    for rows, tokens in dict.fromkeys(shapes):
        dims = (tokens,) if batched else (rows, tokens)
        tensors = tuple(WarmupInput(t.name, t.data_type, dims, _ones(folder, dims)) for t in inputs)
        yield Warmup(f"{rows} texts of {tokens} tokens", rows if batched else 1, tensors)


def _takes_text(inputs: tuple[TensorConfig, ...]) -> bool:
    """Return True for a text tower, whose last dimension is dynamic.

    The front end already batches the requests to a text tower, each with its own length; and while requests
    of different shapes are queued, Triton's batcher spins on a core that the tower needs.
    """
    return any(tensor.dims[-1] == -1 for tensor in inputs)


def _ones(folder: Path, dims: tuple[int, ...]) -> str:
    """Write int64 ones to a file in ``folder/warmup``, shared by tensors of this shape; return its name."""
    name = f"ones_{'x'.join(map(str, dims))}"
    path = folder / WARMUP_FOLDER / name
    if not path.exists():
        path.write_bytes(np.ones(dims, np.int64).tobytes())
    return name
