"""Write a tower's ``config.pbtxt`` with the parameters of its Triton backend.

Source: the backends' code as of Triton 26.08: ``src/onnxruntime.cc`` of onnxruntime_backend,
``src/openvino.cc`` of openvino_backend, ``src/model_state.cc`` and ``src/instance_state.cc`` of
tensorrt_backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.triton.config import (
    GpuOptimization,
    InstanceGroup,
    ModelConfig,
    TensorConfig,
    Warmup,
    WarmupInput,
    tensors_of_graph,
)
from export.triton.plan_config import plan_graphs, plan_instances, plan_warmups
from runtime.errors import ExportError
from runtime.manifest import GPU_ENGINES, Engine, Precision
from runtime.preprocessing.buckets import Buckets, image_buckets, text_buckets
from runtime.triton_config import config_from_text, engine_of_backend, text_from_config
from triton_models.tower import MAX_LENGTH, MAX_ROWS, VOCABULARY_SIZE

__all__ = [
    "BackendSettings",
    "TowerSettings",
    "engine_of_config",
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


@dataclass(frozen=True, slots=True)
class TowerSettings:
    """Serving settings of a tower.

    Attributes:
        instances: Number of requests computed concurrently.
        threads: Threads per instance; None lets a single instance use all cores. Towers on a GPU have none.
    """

    instances: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.instances < 1 or (self.threads is not None and self.threads < 1):
            raise ExportError(
                f"instances is {self.instances} and threads {self.threads}; expected at least 1 of each."
            )


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """Serving settings as ``config.pbtxt`` blocks of a backend; ``provider`` is for its CUDA provider."""

    instances: InstanceGroup
    parameters: Mapping[str, str] = field(default_factory=dict)
    provider: Mapping[str, str] = field(default_factory=dict)


def operation_of_tower(engine: Engine, precision: Precision, settings: TowerSettings) -> BackendSettings:
    """Translate serving settings to the parameters of an engine's backend.

    Towers run where they were measured: those for CUDA and TensorRT on a GPU, all others on the CPU.

    Raises:
        ExportError: the engine does not support the settings.
    """
    if engine in GPU_ENGINES:
        if settings.threads is not None:
            raise ExportError(
                f"A tower for {engine.value} runs on a GPU and has no threads setting; leave threads out."
            )
        instances = InstanceGroup(settings.instances, "KIND_GPU")
        return BackendSettings(instances) if engine is Engine.TENSORRT else _on_cuda(instances)
    instances = InstanceGroup(settings.instances, "KIND_CPU")
    if engine is Engine.ONNXRUNTIME:
        parameters = dict(_NO_MEMORY_PATTERN)
        if settings.threads is not None:
            parameters["intra_op_thread_count"] = str(settings.threads)
        return BackendSettings(instances, parameters)
    return BackendSettings(instances, _openvino_parameters(precision, settings))


_NO_MEMORY_PATTERN = {"enable_mem_pattern": "0"}
"""Shapes change with every batch, and ONNX Runtime would cache a memory pattern for each."""


def _on_cuda(instances: InstanceGroup) -> BackendSettings:
    """Return the settings of ONNX Runtime's backend on a GPU.

    The backend overwrites four of the provider's options with values of ``parameters``, where they are
    numbers: the arena grows by what is requested (1), and convolutions choose their algorithm without trying
    all for every new shape (1). The provider rounds operands of FP32 products to TF32 by default.
    """
    parameters = {
        **_NO_MEMORY_PATTERN,
        "intra_op_thread_count": "1",  # few nodes stay on the CPU; idle threads would spin
        "arena_extend_strategy": "1",
        "cudnn_conv_algo_search": "1",
    }
    return BackendSettings(instances, parameters, provider={"use_tf32": "0"})


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
    vocabulary_size: int | None = None,
    plan: Path | None = None,
    settings: TowerSettings | None = None,
) -> ModelConfig:
    """Return the configuration of a tower, and write its warm-up tensors to ``folder/warmup``.

    Args:
        folder: Folder of the Triton model, which has its name.
        graph: ONNX file that defines the inputs and outputs.
        engine: Engine whose Triton backend runs the tower.
        context_length: Maximum text length in tokens.
        vocabulary_size: Rows of a text tower's embedding.
        plan: TensorRT plan to open in place of the graph.

    Raises:
        ExportError: the graph's tensors are not supported, or the engine does not support the settings.
    """
    # With max_batch_size > 0 the openvino backend compiles for that fixed batch: all requests must have it.
    batched = engine is not Engine.OPENVINO
    inputs, outputs = tensors_of_graph(graph, batched=batched)
    operation = operation_of_tower(engine, precision, settings or TowerSettings())
    buckets = _buckets(inputs, context_length, max_batch_size) if engine in GPU_ENGINES else None
    instances = operation.instances
    warmups: tuple[Warmup, ...]
    if plan is not None:
        instances = plan_instances(plan, instances.count)
        warmups = plan_warmups(plan, folder)
    elif buckets is not None:
        warmups = tuple(_gpu_warmups(inputs, folder, buckets))
    else:
        warmups = tuple(_warmups(inputs, folder, context_length, batched=batched))
    return ModelConfig(
        name=folder.name,
        backend=_BACKENDS[engine],
        platform="" if plan is None else "tensorrt_plan",
        filename=graph.name if plan is None else plan.name,
        max_batch_size=max_batch_size if batched else 0,
        batches=batched and (buckets is not None or not _takes_text(inputs)),
        preferred_batch_sizes=() if buckets is None else buckets.rows,
        inputs=inputs,
        outputs=outputs,
        instances=instances,
        parameters={
            "babeltower_fingerprint": fingerprint,
            **({MAX_LENGTH: str(context_length)} if _takes_text(inputs) else {}),
            MAX_ROWS: str(max_batch_size),
            **({} if vocabulary_size is None else {VOCABULARY_SIZE: str(vocabulary_size)}),
            **operation.parameters,
        },
        gpu=None
        if buckets is None
        else GpuOptimization(operation.provider, () if plan is None else plan_graphs(plan, inputs, buckets)),
        warmups=warmups,
    )


_BACKENDS = {
    Engine.ONNXRUNTIME: "onnxruntime",
    Engine.OPENVINO: "openvino",
    Engine.CUDA: "onnxruntime",
    Engine.TENSORRT: "tensorrt",
}
"""Triton backend of each engine."""


def _buckets(inputs: tuple[TensorConfig, ...], context_length: int, max_rows: int) -> Buckets:
    """Return the shapes that a tower's front end sends on a GPU."""
    if _takes_text(inputs):
        return text_buckets(context_length, max_rows=max_rows)
    return image_buckets(max_rows=max_rows)


def resettled(config: str, precision: Precision, settings: TowerSettings) -> str:
    """Return a tower's ``config.pbtxt`` with new serving settings; everything else is unchanged.

    Raises:
        ExportError: its backend cannot be operated so, or instances would share the cores.
        ManifestError: it does not parse.
    """
    parsed = config_from_text(config, origin="The tower's config.pbtxt")
    if settings.instances > 1 and settings.threads is None and engine_of_config(parsed) not in GPU_ENGINES:
        raise ExportError(
            f"{settings.instances} instances would each use all cores; pass the threads of each."
        )
    resettle(parsed, precision, settings)
    return text_from_config(parsed)


def resettle(config: Any, precision: Precision, settings: TowerSettings) -> None:
    """Apply serving settings to a parsed ``inference.ModelConfig``, in place.

    Raises:
        ExportError: it does not belong to a tower, or its backend does not support the settings.
    """
    operation = operation_of_tower(engine_of_config(config), precision, settings)
    profiles = [profile for group in config.instance_group for profile in group.profile]
    del config.instance_group[:]
    group = config.instance_group.add(count=operation.instances.count, profile=profiles)
    group.kind = type(group).Kind.Value(operation.instances.kind)
    for key in [key for key in config.parameters if not key.startswith(_OURS)]:
        del config.parameters[key]
    for key, value in operation.parameters.items():
        config.parameters[key].string_value = value


def settings_of_config(config: Any) -> TowerSettings:
    """Read the serving settings from a parsed tower configuration.

    Raises:
        ExportError: it does not belong to a tower.
    """
    instances = max(1, sum(group.count for group in config.instance_group))
    engine = engine_of_config(config)
    if engine in GPU_ENGINES:
        return TowerSettings(instances)
    if engine is Engine.OPENVINO:
        threads = _whole(config, "INFERENCE_NUM_THREADS") // instances
    else:
        threads = _whole(config, "intra_op_thread_count")
    return TowerSettings(instances, threads or None)


def engine_of_config(config: Any) -> Engine:
    """Engine of a tower's parsed configuration.

    Raises:
        ExportError: it does not belong to a tower.
    """
    on_gpu = any(group.kind == group.KIND_GPU for group in config.instance_group)
    try:
        return engine_of_backend(config.backend, on_gpu=on_gpu)
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


def _gpu_warmups(inputs: tuple[TensorConfig, ...], folder: Path, buckets: Buckets) -> Iterator[Warmup]:
    """Yield a warm-up request of one row and of the most rows of each length; all values are 1.

    Kernels are chosen for each shape, and the largest shapes make the memory arena as large as it gets.
    """
    (folder / WARMUP_FOLDER).mkdir(exist_ok=True)
    for length in reversed(buckets.lengths):
        dims = {t.name: (length,) if t.dims == (-1,) else t.dims for t in inputs}
        tensors = tuple(
            WarmupInput(t.name, t.data_type, dims[t.name], _ones(folder, dims[t.name], t.data_type))
            for t in inputs
        )
        for rows in sorted({buckets.rows_at(length)[-1], 1}, reverse=True):
            what = f"{rows} × {length} tokens" if _takes_text(inputs) else f"{rows} images"
            yield Warmup(what, rows, tensors)


def _takes_text(inputs: tuple[TensorConfig, ...]) -> bool:
    """Return True for a text tower, whose last dimension is dynamic.

    On a CPU, such a tower has no dynamic batcher: the front end already batches its requests, each with its
    own length, and while requests of different shapes are queued, Triton's batcher spins on a core that the
    tower needs. On a GPU, front ends pad to few lengths, and requests of several of them are joined.
    """
    return any(tensor.dims[-1] == -1 for tensor in inputs)


def _ones(folder: Path, dims: tuple[int, ...], data_type: str = "TYPE_INT64") -> str:
    """Write ones to a file in ``folder/warmup``, shared by tensors of this shape; return its name."""
    name = f"ones_{'x'.join(map(str, dims))}"
    path = folder / WARMUP_FOLDER / name
    if not path.exists():
        path.write_bytes(np.ones(dims, _DTYPES[data_type]).tobytes())
    return name


_DTYPES = {"TYPE_INT64": np.int64, "TYPE_UINT8": np.uint8}
