"""Skips, by name, for what this processor cannot run: OpenVINO's BF16, and its INT8 without VNNI."""

from __future__ import annotations

import pytest

from export.variants import FORMS, Form
from runtime.backends import require_computes
from runtime.errors import EngineError
from runtime.manifest import GRAPH_ENGINES, Engine, Precision

__all__ = [
    "CPU_ENGINES",
    "LOWER_FORMS",
    "computes_here",
    "form_params",
    "forms_here",
    "int8_engine_params",
    "needs",
]

CPU_ENGINES = (Engine.ONNXRUNTIME, Engine.OPENVINO)
LOWER_FORMS = tuple(
    form for form in FORMS if form.precision is not Precision.FP32 and set(form.opened_by) <= set(CPU_ENGINES)
)
"""Forms of lower precision for the engines of a CPU."""


def computes_here(engine: Engine, precision: Precision) -> str | None:
    """The reason why an engine does not compute in a precision here; ``None`` where it does."""
    try:
        require_computes(engine, precision)
    except EngineError as error:
        return str(error)
    return None


def needs(engine: Engine, precision: Precision) -> pytest.MarkDecorator:
    """Mark that skips a test where an engine does not compute in a precision, with the reason."""
    reason = computes_here(engine, precision)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def form_params() -> list[object]:
    """Every lower form as a test's parameter, skipped where the processor cannot run it."""
    return [
        pytest.param(form, id=form.key, marks=[needs(engine, form.precision) for engine in form.opened_by])
        for form in LOWER_FORMS
    ]


def forms_here() -> tuple[Form, ...]:
    """Lower forms that the processor can run."""
    return tuple(
        form for form in LOWER_FORMS if not any(computes_here(e, form.precision) for e in form.opened_by)
    )


def int8_engine_params() -> list[object]:
    """Engines as a test's parameter, skipped where their INT8 is not right on the processor."""
    return [
        pytest.param(engine, id=engine.value, marks=needs(engine, Precision.INT8)) for engine in GRAPH_ENGINES
    ]
