"""Graphs of a timed tower for CUDA, made from its skeleton where they are timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir

from bench.gpu.skeletons import graph_from_skeleton
from export.graphs.cuda_form import suit_cuda
from export.graphs.files import save_graph
from export.graphs.float_types import float_values
from export.graphs.fused_attention import Projections
from export.graphs.spelled_packing import spell_out_packing
from export.precision.fp16 import bfloat16_from_onnx, halve_model
from runtime.manifest import Precision
from runtime.preprocessing.buckets import CONTEXT_LENGTH, PACKED_TEXT

__all__ = ["TIMED_CONTEXT_LENGTH", "TIMED_FORMS", "TimedForm", "forms_to_time", "graph_for_gpu"]

_MAGNITUDE = 1.0
"""Assumed magnitude of every activation: random weights keep all of them far below FP16's largest."""

TIMED_CONTEXT_LENGTH = 77
"""Longest text of the timed towers, in tokens."""


@dataclass(frozen=True, slots=True)
class TimedForm:
    """Form of a tower's graph that is timed.

    Attributes:
        by: Name in tables.
        precision: Precision of the products.
        projections: Products that compute query, key and value.
        capture: Replay a CUDA graph per shape.
        in_full: Time calls and NumPy to NumPy too, not only the device.
        most_rows: Largest batch that is timed.
        attention: ONNX Runtime's ``sdpa_kernel``: the kernels that it may choose from; all if empty.
        texts_only: Time text towers only.
        packed: Compute texts without padding; no CUDA graph is captured then.
        spelled_out: Compute packed texts with operators that a processor has.
    """

    by: str
    precision: Precision
    projections: Projections = Projections.SEPARATE
    capture: bool = True
    in_full: bool = False
    most_rows: int = 512
    attention: str = ""
    texts_only: bool = False
    packed: bool = False
    spelled_out: bool = False


TIMED_FORMS = (
    TimedForm("babeltower", Precision.FP16, in_full=True),
    TimedForm(
        "babeltower, packed texts", Precision.FP16, capture=False, in_full=True, texts_only=True, packed=True
    ),
    TimedForm("babeltower, plain attention", Precision.FP16, attention="16", texts_only=True),
    TimedForm("babeltower", Precision.BF16),
    TimedForm("babeltower", Precision.FP32, most_rows=128),
)
"""In order of worth; the first is the product's own."""

_DRY_FORMS = (
    TimedForm("babeltower", Precision.FP32, in_full=True),
    TimedForm(
        "babeltower, packed texts",
        Precision.FP32,
        capture=False,
        in_full=True,
        texts_only=True,
        packed=True,
        spelled_out=True,
    ),
)


def forms_to_time(*, dry: bool) -> tuple[TimedForm, ...]:
    """Return the forms that are timed; a processor has no FP16 kernels of the fused nodes."""
    return _DRY_FORMS if dry else TIMED_FORMS


def graph_for_gpu(skeleton: Path, form: TimedForm, folder: Path) -> Path:
    """Return a tower's fused graph with random weights in a form, writing it if it is missing."""
    source = graph_from_skeleton(skeleton, folder)
    layout = "packed-text" if form.packed else form.projections.value
    target = folder / f"{source.stem}-{layout}-{form.precision.value}.onnx"
    if target.is_file():
        return target
    model = onnx_ir.load(source)
    suit_cuda(model, projections=form.projections, packed_text=form.packed)
    model.metadata_props[CONTEXT_LENGTH] = str(TIMED_CONTEXT_LENGTH)
    if form.packed:
        model.metadata_props[PACKED_TEXT] = "1"
    data_name = f"{target.stem}.data"
    if form.precision is Precision.BF16:
        fused = graph_for_gpu(skeleton, replace(form, precision=Precision.FP32), folder)
        bfloat16_from_onnx(fused, target, data_name=data_name)
        return target
    if form.precision is Precision.FP16:
        halve_model(model, {str(v.name): _MAGNITUDE for node in model.graph for v in float_values(node)})
    if form.spelled_out:
        spell_out_packing(model)
    save_graph(model, target, data_name=data_name)
    return target
