"""FP32 graph → the graph of a variant: which forms there are, which engines open them, how each is made.

A new form is a row in ``FORMS``. A form that is made for one engine alone carries its name; ``key`` is what
``runtime.manifest`` calls the variant.
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
from export.precision.fp16 import fp16_from_onnx
from export.precision.graph_request import GraphRequest, MakeGraph
from export.precision.int8 import GraphTarget, Int8Report, int8_from_onnx, recipe_for
from export.tensorrt.variant import TensorRtGraph, plan_maker, require_gpu
from runtime.backends import require_computes
from runtime.errors import EngineError, ExportError
from runtime.manifest import GRAPH_ENGINES, Engine, Precision, variant_name

__all__ = ["FORMS", "FP32", "Form", "forms_for", "possible_forms"]


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of variant.

    Attributes:
        engine: The one engine that the graphs are made for; ``None`` where they are made for any.
        opened_by: Engines that may open the variant.
        make: Writes a tower's graph and says how, in plain values.
        require: Raises where the form cannot be made on this machine; see ``require_here``.
    """

    precision: Precision
    engine: Engine | None
    opened_by: tuple[Engine, ...]
    make: MakeGraph = field(repr=False)
    needs_calibration: bool = False
    require: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """What the manifest calls the variant."""
        return variant_name(self.precision, None if self.engine is None else self.engine.value)

    def require_here(self) -> None:
        """Check, before any work, that this machine can make the form and measure it on every engine.

        Raises:
            EngineError: it cannot; the message names the processor and what to use instead.
        """
        if self.require is not None:
            self.require()
        for engine in self.opened_by:
            if engine in GRAPH_ENGINES:
                require_computes(engine, self.precision)


def forms_for(
    precisions: Sequence[Precision], engines: Sequence[Engine], *, installed: Sequence[Engine]
) -> tuple[Form, ...]:
    """The forms of some precisions for some engines.

    Args:
        engines: All that are installed and have a form of the precision, if empty.
        installed: Engines that can be measured here; nothing is published that was not measured.

    Raises:
        ExportError: no form of a precision is for the engines asked, or the engine is not installed.
    """
    if missing := [engine.value for engine in engines if engine not in installed]:
        raise ExportError(
            f"Engine {missing[0]} is not installed here, so a variant for it could not be compared with "
            f"PyTorch. Install it, or name one of {[engine.value for engine in installed]}."
        )
    wanted = engines or installed
    chosen: list[Form] = []
    for precision in dict.fromkeys(precisions):
        of_precision = [form for form in FORMS if form.precision is precision]
        possible = [
            dataclasses.replace(form, opened_by=opened_by)
            for form in of_precision
            if (opened_by := tuple(engine for engine in form.opened_by if engine in wanted))
        ]
        if not possible:
            able = sorted({engine.value for form in of_precision for engine in form.opened_by})
            raise ExportError(
                f"{precision.value} has no form for {[engine.value for engine in wanted]}; it has forms for "
                f"{able}. Install one of these, or choose another precision."
            )
        chosen += possible
    return tuple(chosen)


def possible_forms(forms: Sequence[Form]) -> tuple[tuple[Form, ...], Mapping[str, str]]:
    """Split forms into those that this machine can make and measure, and the others.

    Returns:
        The possible forms, in order, and for each of the others its key and the reason.
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
    """The source itself."""
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


def _tensorrt(precision: Precision) -> Form:
    def describe(graph: TensorRtGraph) -> Mapping[str, Any]:
        if graph.int8 is not None:
            return _int8_json(graph.int8)
        return {f"{precision.value}_share": graph.share, "kept_products": list(graph.kept_products)}

    return Form(
        precision,
        Engine.TENSORRT,
        (Engine.TENSORRT,),
        plan_maker(precision, describe),
        needs_calibration=precision is not Precision.FP32,
        require=require_gpu,
    )


def _calibration(request: GraphRequest) -> CalibrationSet:
    if request.calibration is None:
        raise ExportError("This form is calibrated, and no calibration set was given.")
    return request.calibration


_CPU = (Engine.ONNXRUNTIME, Engine.OPENVINO)

FP32 = Form(Precision.FP32, None, _CPU, _fp32)

FORMS: tuple[Form, ...] = (
    FP32,
    # OpenVINO computes in fp16 on GPUs alone, and offers it on no CPU that was seen.
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
    *map(_tensorrt, (Precision.FP32, Precision.FP16, Precision.INT8, Precision.FP8)),
)
