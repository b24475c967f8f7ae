"""Build a TensorRT plan from an ONNX graph, with its manifest and the ONNX file beside it.

The graph determines the precision: networks are strongly typed, which is an option in TensorRT 10 and the
only mode in 11. Only calls common to 10.x and 11.x are used. With ``Compiler.TENSORRT_RTX`` the same code
builds ahead of time for a given compute capability on a machine without a GPU, which checks the graph but
does not give a plan to serve.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir

from export.graphs.files import external_files
from export.tensorrt.kernels import Kernel, kernels_from_inspection, kernels_from_log, summary_from_kernels
from export.tensorrt.options import EngineOptions
from runtime.backends.cuda import open_device
from runtime.backends.plans import (
    AHEAD_OF_TIME,
    TENSORRT_MAJORS,
    VERSION_COMPATIBLE,
    Compiler,
    DeviceFacts,
    PlanManifest,
    Portability,
    Profile,
    TensorSpec,
)
from runtime.errors import EngineError, ExportError
from runtime.extras import import_optional
from runtime.manifest import Precision
from runtime.storage import replace_file, sha256_of_file

__all__ = ["engine_from_onnx", "require_compiler"]

_MODULES = {Compiler.TENSORRT: "tensorrt", Compiler.TENSORRT_RTX: "tensorrt_rtx"}


def engine_from_onnx(
    graph: Path,
    plan: Path,
    *,
    profiles: Sequence[Profile],
    options: EngineOptions | None = None,
) -> PlanManifest:
    """Build a plan and write its manifest and the ONNX file beside it.

    Args:
        graph: ONNX file whose types determine the precision: FP32, or the output of ``tensorrt_graph``.
        plan: Output file.
        profiles: Optimization profiles (input shapes) of the plan; see ``default_profiles``.

    Raises:
        ExportError: a profile does not match the graph, TensorRT rejects the graph (the message names the
            node), or the built kernels do not compute in the graph's precision.
        EngineError: the library or a GPU is missing.
    """
    options = options or EngineOptions()
    model = onnx_ir.load(graph)
    inputs, outputs = _specs(model.graph.inputs), _specs(model.graph.outputs)
    _require_profiles(profiles, inputs)
    tensorrt = _library(options.compiler)
    device = _target(options)
    _require_capable(model, device)
    log = _log(tensorrt)
    serialized = _built(tensorrt, graph, inputs, profiles, options, log)
    kernels = summary_from_kernels(model, _kernels(tensorrt, serialized, options, log))
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_bytes(memoryview(serialized))
    kept = _keep_graph(model, graph, plan.parent)
    manifest = PlanManifest(
        compiler=options.compiler.value,
        compiler_version=str(tensorrt.__version__),
        cuda=device.cuda,
        gpu=device.name,
        compute_capability=device.compute_capability,
        portability=options.portability.value,
        version_compatible=options.version_compatible,
        precision=model.metadata_props.get("babeltower.precision", "fp32"),
        profiles=tuple(profiles),
        inputs=inputs,
        outputs=outputs,
        kernels=kernels,
        plan_sha256=sha256_of_file(plan),
        plan_bytes=plan.stat().st_size,
        onnx=kept.name,
        onnx_sha256=sha256_of_file(kept),
        onnx_data={path.name: sha256_of_file(kept.with_name(path.name)) for path in external_files(model)},
        options=options.as_json(),
        runs_on=_releases(str(tensorrt.__version__), options),
        serve_with=VERSION_COMPATIBLE if options.version_compatible else "",
        note=AHEAD_OF_TIME if options.compiler is Compiler.TENSORRT_RTX else "",
    )
    manifest.write(plan)
    return manifest


def require_compiler(options: EngineOptions) -> DeviceFacts:
    """Check that plans can be built, and return the GPU that they are built for.

    Raises:
        EngineError: the library or a GPU is missing, or the library's release is not supported.
    """
    _network_flags(_library(options.compiler))
    return _target(options)


def _specs(values: Sequence[onnx_ir.Value]) -> dict[str, TensorSpec]:
    specs = {}
    for value in values:
        if value.shape is None or value.dtype is None:
            raise ExportError(f"Tensor {value.name!r} of the graph has no shape or type; export it again.")
        dims = tuple(str(dim if isinstance(dim, int) else dim.value) for dim in value.shape)
        specs[str(value.name)] = TensorSpec(value.dtype.numpy().name, dims)
    return specs


def _require_profiles(profiles: Sequence[Profile], inputs: Mapping[str, TensorSpec]) -> None:
    dynamic = {dim for spec in inputs.values() for dim in spec.dims if not dim.isdigit()}
    if not profiles:
        raise ExportError(f"No profile was given; the graph has dynamic dimensions {sorted(dynamic)}.")
    for profile in profiles:
        if set(profile.dims) != dynamic:
            raise ExportError(
                f"Profile ({profile}) names {sorted(profile.dims)}; the graph's dynamic dimensions are "
                f"{sorted(dynamic)}."
            )


def _library(compiler: Compiler) -> Any:
    package = "babeltower[tensorrt]" if compiler is Compiler.TENSORRT else "tensorrt-rtx-cu12==1.7.1.116"
    remedy = "(nothing is built with another compiler)"
    return import_optional(_MODULES[compiler], f"The compiler {compiler.value}", package, remedy=remedy)


def _target(options: EngineOptions) -> DeviceFacts:
    """Return the installed GPU, or the target of an ahead-of-time build."""
    if options.compute_capability is not None:
        return DeviceFacts(name="", compute_capability=options.compute_capability, cuda="")
    device = open_device(options.gpu)
    device.close()
    return device.facts


def _require_capable(model: onnx_ir.Model, device: DeviceFacts) -> None:
    types = {value.dtype for value in model.graph.initializers.values()}
    if onnx_ir.DataType.FLOAT8E4M3FN in types and not device.multiplies_in(Precision.FP8):
        raise ExportError(
            f"The graph uses FP8, which compute capability {device.compute_capability} does not support; it "
            "needs 8.9 (Ada) or newer. Export int8 or fp16."
        )
    if onnx_ir.DataType.BFLOAT16 in types and not device.multiplies_in(Precision.BF16):
        raise ExportError(
            f"The graph uses BF16, which compute capability {device.compute_capability} does not support; it "
            "needs 8.0 (Ampere) or newer. Export fp16."
        )


def _log(tensorrt: Any) -> Any:
    class Log(tensorrt.ILogger):  # type: ignore[misc]
        """Logger that stores the library's messages, which include the kernel listing."""

        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append(message)
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def last_error(self) -> str:
            return (
                "; ".join(message.splitlines()[0] for message in self.errors[-2:]) or "no reason was logged"
            )

    return Log()


def _kernels(tensorrt: Any, plan: Any, options: EngineOptions, log: Any) -> list[Kernel]:
    """List the built kernels, from RTX's build log or from the loaded TensorRT plan."""
    if options.compiler is Compiler.TENSORRT_RTX:
        return kernels_from_log(log.messages)
    runtime = tensorrt.Runtime(log)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True  # a version-compatible plan contains its own runtime
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(f"{_release(tensorrt)} cannot load its own plan: {log.last_error()}")
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise ExportError(
            f"{_release(tensorrt)} cannot list the kernels of the plan, so their precision cannot be "
            f"checked: {log.last_error()}."
        )
    return kernels_from_inspection(inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON))


def _built(
    tensorrt: Any,
    graph: Path,
    inputs: Mapping[str, TensorSpec],
    profiles: Sequence[Profile],
    options: EngineOptions,
    log: Any,
) -> Any:
    """Build the plan; return it as a serialised buffer."""
    builder = tensorrt.Builder(log)
    network = builder.create_network(_network_flags(tensorrt))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise ExportError(f"{_release(tensorrt)} cannot parse {graph}: {_parse_errors(parser)}")
    config = builder.create_builder_config()
    _configure(tensorrt, config, options)
    for profile in profiles:
        if config.add_optimization_profile(_optimization_profile(builder, inputs, profile)) < 0:
            raise ExportError(f"{_release(tensorrt)} rejects profile ({profile}): {log.last_error()}")
    _load_timings(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{_release(tensorrt)} could not build {graph}: {log.last_error()}")
    if options.timing_cache is not None:
        options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
        timings = memoryview(config.get_timing_cache().serialize())
        replace_file(options.timing_cache, lambda unfinished: unfinished.write_bytes(timings))
    return plan


def _releases(version: str, options: EngineOptions) -> str:
    """Describe the releases that can open a plan, for whoever chooses a server's container."""
    if options.compiler is Compiler.TENSORRT_RTX:
        return ""
    if not options.version_compatible:
        return f"TensorRT {version} alone"
    return f"TensorRT {version} and later releases of {version.split('.')[0]}.x"


def _parse_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(
        f"node {error.node_name()!r} ({error.node_operator()}): {error.desc().splitlines()[0]}"
        for error in errors[:3]
    )


def _network_flags(tensorrt: Any) -> int:
    """Return the flags of a strongly typed network: a flag in TensorRT 10, the only mode in 11 and RTX."""
    if tensorrt.__name__ == _MODULES[Compiler.TENSORRT_RTX]:
        return 0
    major = int(str(tensorrt.__version__).split(".")[0])
    if major not in TENSORRT_MAJORS:
        raise EngineError(
            f"TensorRT {tensorrt.__version__} is not supported; install a release of the majors "
            f"{TENSORRT_MAJORS}."
        )
    return 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if major == 10 else 0


def _configure(tensorrt: Any, config: Any, options: EngineOptions) -> None:
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    flags = tensorrt.BuilderFlag
    config.clear_flag(flags.TF32)
    if options.tf32:
        config.set_flag(flags.TF32)
    if options.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
    if options.weight_streaming:
        config.set_flag(flags.WEIGHT_STREAMING)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.portability is not Portability.NONE:
        level = options.portability.value.upper().replace("-", "_")
        config.hardware_compatibility_level = getattr(tensorrt.HardwareCompatibilityLevel, level)
    if options.compute_capability is not None:
        _aim(tensorrt, config, options.compute_capability)


def _aim(tensorrt: Any, config: Any, compute_capability: str) -> None:
    """Set the target of an ahead-of-time build, since ``CURRENT`` is undefined without a GPU."""
    name = "SM" + compute_capability.replace(".", "")
    target = getattr(tensorrt.ComputeCapability, name, None)
    if target is None:
        known = sorted(n for n in dir(tensorrt.ComputeCapability) if n.startswith("SM"))
        raise ExportError(
            f"{_release(tensorrt)} does not build for compute capability {compute_capability}; it supports "
            f"{known}."
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(target, 0)


def _optimization_profile(builder: Any, inputs: Mapping[str, TensorSpec], profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    corners = [
        {name: getattr(extent, corner) for name, extent in profile.dims.items()}
        for corner in ("least", "usual", "most")
    ]
    for name, spec in inputs.items():
        made.set_shape(name, *(spec.shape(sizes) for sizes in corners))
    return made


def _load_timings(config: Any, path: Path | None) -> None:
    """Load the timing cache, or create an empty one; a cache of another GPU or release is an error."""
    if path is None:
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ExportError(
            f"Timing cache {path} belongs to another TensorRT release or GPU; remove it, or pass another "
            "path."
        )


def _keep_graph(model: onnx_ir.Model, graph: Path, folder: Path) -> Path:
    """Copy the ONNX file and its external data beside the plan; return the ONNX file's path."""
    if graph.parent.resolve() == folder.resolve():
        return graph
    for path in (graph, *external_files(model)):
        shutil.copy2(path, folder / path.name)
    return folder / graph.name


def _release(tensorrt: Any) -> str:
    return f"{tensorrt.__name__} {tensorrt.__version__}"
