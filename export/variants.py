"""Registry of variant forms: precision, supported engines, and conversion from the FP32 graph.

To add a form, add a row to ``FORMS``. A form for a single engine has the engine's name in its ``key``, which
is the name of the variant in ``runtime.manifest``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from export.graphs.files import copy_graph
from export.precision.activation_ranges import activation_ranges
from export.precision.bf16 import bf16_from_onnx
from export.precision.calibration import CalibrationSet
from export.precision.cuda import cuda_from_onnx, require_packs
from export.precision.fp16 import fp16_from_onnx
from export.precision.graph_request import GraphRequest, MakeGraph
from export.precision.int8 import GraphTarget, Int8Report, int8_from_onnx, recipe_for
from export.tensorrt.options import EngineOptions
from export.tensorrt.variant import TensorRtGraph, plan_maker, require_gpu
from runtime.backends import require_computes
from runtime.device import Device
from runtime.errors import EngineError, ExportError
from runtime.extras import install_hint
from runtime.manifest import (
    GPU_ENGINES,
    GRAPH_ENGINES,
    PACKED_TEXT_RECIPE,
    Engine,
    Modality,
    Precision,
    variant_name,
)

__all__ = ["FORMS", "FP32", "Form", "forms_for", "possible_forms"]


@dataclass(frozen=True, slots=True)
class Form:
    """Form of a variant: precision and engine.

    Attributes:
        engine: Engine that the graphs are built for; None if they are for any engine.
        opened_by: Engines that can open the variant.
        make: Function that writes a tower's graph and returns its recipe as plain values.
        needs_calibration: A calibration set is required.
        require: Function that raises if the form cannot be built on this machine; see ``require_here``.
        device: GPU that the form is built and measured on; None for the first, or the processor.
    """

    precision: Precision
    engine: Engine | None
    opened_by: tuple[Engine, ...]
    make: MakeGraph = field(repr=False)
    needs_calibration: bool = False
    require: Callable[[], None] | None = field(default=None, repr=False)
    device: Device | None = None

    @property
    def key(self) -> str:
        """Name of the variant in the manifest."""
        return variant_name(self.precision, None if self.engine is None else self.engine.value)

    def require_here(self) -> None:
        """Check, before any work, that this machine can build the form and measure it on all its engines.

        Raises:
            EngineError: it cannot; the message names the processor and an alternative.
        """
        if self.require is not None:
            self.require()
        for engine in self.opened_by:
            if engine in GRAPH_ENGINES:
                require_computes(engine, self.precision)


def forms_for(
    precisions: Sequence[Precision],
    engines: Sequence[Engine],
    *,
    installed: Sequence[Engine],
    tensorrt: EngineOptions | None = None,
    packed_text: bool = False,
    device: Device | None = None,
) -> tuple[Form, ...]:
    """Return the forms of the given precisions for the given engines.

    Args:
        engines: Requested engines; if empty, all installed CPU engines that have a form of the precision.
            Nothing is built for a GPU unless its engine is requested.
        installed: Engines that can be measured here; unmeasured variants are not published.
        tensorrt: Build options of TensorRT plans; the defaults if None.
        packed_text: Text towers for CUDA compute no padding.
        device: GPU that forms for one are built and measured on; the first by default.

    Raises:
        ExportError: a precision has no form for the requested engines, an engine is not installed, or
            TensorRT options, packed text or a GPU are given without a form that they apply to.
    """
    if missing := [engine.value for engine in engines if engine not in installed]:
        raise ExportError(
            f"Engine {missing[0]} is not installed, so a variant for it cannot be compared with PyTorch. "
            f"{install_hint(missing[0])}, or name another engine; `babeltower engines` lists what runs here."
        )
    wanted = engines or [engine for engine in installed if engine not in GPU_ENGINES]
    chosen: list[Form] = []
    for precision in dict.fromkeys(precisions):
        forms = _forms(tensorrt, packed_text=packed_text, device=device)
        of_precision = [form for form in forms if form.precision is precision]
        possible = [
            dataclasses.replace(form, opened_by=opened_by)
            for form in of_precision
            if (opened_by := tuple(engine for engine in form.opened_by if engine in wanted))
        ]
        if not possible:
            able = sorted({engine.value for form in of_precision for engine in form.opened_by})
            raise ExportError(
                f"{precision.value} is not supported on {[engine.value for engine in wanted]}, only on "
                f"{able}. Install and name one of these (--engine), or choose another precision."
            )
        chosen += possible
    if tensorrt is not None and not any(form.engine is Engine.TENSORRT for form in chosen):
        raise ExportError("TensorRT options apply to no variant of this export; add --engine tensorrt.")
    if device is not None:
        _require_on(device, chosen)
    if packed_text:
        _require_packable([form.precision for form in chosen if form.engine is Engine.CUDA])
    return tuple(chosen)


def _require_on(device: Device, forms: Sequence[Form]) -> None:
    on_gpu = [form.key for form in forms if form.engine in GPU_ENGINES]
    if device.is_gpu and not on_gpu:
        raise ExportError(f"Device {device} applies to no variant of this export; add --engine cuda.")
    if not device.is_gpu and on_gpu:
        raise ExportError(
            f"{on_gpu[0]} is built and measured on a GPU; pass --device cuda:N, or leave it out."
        )


def _require_packable(precisions: Sequence[Precision]) -> None:
    if not precisions:
        raise ExportError("Packed text applies to no variant of this export; add --engine cuda.")
    for precision in precisions:
        require_packs(precision)


def _forms(tensorrt: EngineOptions | None, *, packed_text: bool, device: Device | None) -> tuple[Form, ...]:
    def chosen(form: Form) -> Form:
        if form.engine is Engine.TENSORRT:
            return _tensorrt(form.precision, tensorrt or EngineOptions(), device)
        return _cuda(form.precision, device, packed_text=packed_text) if form.engine is Engine.CUDA else form

    return tuple(map(chosen, FORMS))


def possible_forms(forms: Sequence[Form]) -> tuple[tuple[Form, ...], Mapping[str, str]]:
    """Split forms into those that this machine can build and measure, and the others.

    Returns:
        The possible forms, in order, and the reason for each of the others, by key.
    """
    possible, refused = [], {}
    for form in forms:
        try:
            form.require_here()
        except EngineError as error:
            refused[form.key] = str(error)
        else:
            possible.append(form)
    return tuple(possible), refused


def _fp32(request: GraphRequest) -> dict[str, Any]:
    """Copy the source graph."""
    copy_graph(request.source, request.target)
    return {}


def _fp16(request: GraphRequest) -> dict[str, Any]:
    ranges = activation_ranges(request.source, _calibration(request).batches(request.modality))
    report = fp16_from_onnx(request.source, request.target, data_name=request.data_name, ranges=ranges)
    return {
        "half_share": report.half_share,
        "n_clamps": report.n_clamps,
        "kept_products": [node.name for node in report.kept_products],
    }


def _bf16(request: GraphRequest) -> dict[str, Any]:
    report = bf16_from_onnx(request.source, request.target, data_name=request.data_name)
    return {"n_bf16_weights": report.n_weights}


def _int8(target: GraphTarget) -> MakeGraph:
    def make(request: GraphRequest) -> dict[str, Any]:
        recipe = dataclasses.replace(request.recipe or recipe_for(target), target=target)
        report = int8_from_onnx(
            request.source,
            request.target,
            data_name=request.data_name,
            calibration=_calibration(request).batches(request.modality),
            recipe=recipe,
        )
        return _int8_json(report)

    return make


def _int8_json(report: Int8Report) -> dict[str, Any]:
    recipe = report.recipe
    return {
        "int8_share": report.share_int8,
        "n_int8_products": report.n_int8,
        "kept_products": list(report.kept),
        "n_smoothed": report.n_smoothed,
        "method": recipe.method.value,
        "percentile": recipe.percentile,
        "smooth": recipe.smooth,
        "table": recipe.table.value,
        "activations": recipe.encoding.value,
        "largest_weight_code": recipe.largest_code,
        "rounding": recipe.rounding.value,
    }


def _cuda(precision: Precision, device: Device | None = None, *, packed_text: bool = False) -> Form:
    gpu = _gpu(device)

    def make(request: GraphRequest) -> dict[str, Any]:
        packs = packed_text and request.modality is Modality.TEXT
        report = cuda_from_onnx(
            request.source,
            request.target,
            data_name=request.data_name,
            precision=precision,
            batches=lambda: _calibration(request).batches(request.modality),
            packed_text=packs,
        )
        found: dict[str, Any] = {"fused": dict(report.form.fused), "n_nodes": report.form.n_nodes}
        if packs:
            found[PACKED_TEXT_RECIPE] = True
        if report.half is not None:
            found[f"{precision.value}_share"] = report.half.half_share
            found["n_clamps"] = report.half.n_clamps
            found["kept_products"] = [node.name for node in report.half.kept_products]
        return found

    return Form(
        precision,
        Engine.CUDA,
        (Engine.CUDA,),
        make,
        needs_calibration=precision is Precision.FP16,
        require=lambda: require_computes(Engine.CUDA, precision, gpu=gpu),
        device=device,
    )


def _tensorrt(precision: Precision, options: EngineOptions, device: Device | None = None) -> Form:
    options = dataclasses.replace(options, gpu=_gpu(device))

    def describe(graph: TensorRtGraph) -> Mapping[str, Any]:
        if graph.int8 is not None:
            return _int8_json(graph.int8)
        return {f"{precision.value}_share": graph.share, "kept_products": list(graph.kept_products)}

    return Form(
        precision,
        Engine.TENSORRT,
        (Engine.TENSORRT,),
        plan_maker(precision, options, describe),
        needs_calibration=precision not in (Precision.FP32, Precision.BF16),
        require=lambda: require_gpu(options),
        device=device,
    )


def _gpu(device: Device | None) -> int:
    return 0 if device is None else device.gpu or 0


def _calibration(request: GraphRequest) -> CalibrationSet:
    if request.calibration is None:
        raise ExportError("This variant needs a calibration set, but none was given. Pass one.")
    return request.calibration


_CPU = (Engine.ONNXRUNTIME, Engine.OPENVINO)

FP32 = Form(Precision.FP32, None, _CPU, _fp32)

FORMS: tuple[Form, ...] = (
    FP32,
    # OpenVINO computes in fp16 only on GPUs; no CPU tested supports it.
    Form(Precision.FP16, None, (Engine.ONNXRUNTIME,), _fp16, needs_calibration=True),
    Form(Precision.BF16, Engine.OPENVINO, (Engine.OPENVINO,), _bf16),
    Form(
        Precision.INT8,
        Engine.ONNXRUNTIME,
        (Engine.ONNXRUNTIME,),
        _int8(GraphTarget.ONNXRUNTIME),
        needs_calibration=True,
    ),
    Form(
        Precision.INT8,
        Engine.OPENVINO,
        (Engine.OPENVINO,),
        _int8(GraphTarget.OPENVINO),
        needs_calibration=True,
    ),
    *map(_cuda, (Precision.FP32, Precision.FP16, Precision.BF16)),
    *(_tensorrt(precision, EngineOptions()) for precision in Precision),
)
