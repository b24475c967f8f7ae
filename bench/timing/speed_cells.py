"""Cells of the speed of precisions: towers and shapes, their targets, and verdicts from records.

A cell is a tower, a shape (``8×16``: rows × tokens; ``8`` of images) and a form (``openvino int8``). All
forms of a shape are measured in the same turns, so their ratios are taken within a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bench.records.record import Record, interval, paired, ratios_by_turn
from runtime.manifest import Modality, Precision

__all__ = [
    "CASES",
    "NNCF",
    "PEAK",
    "TARGETS",
    "TORCH",
    "SpeedCase",
    "SpeedTarget",
    "cells_by_shape",
    "share_of_peak",
    "verdicts_of_cells",
]

TORCH, NNCF, PEAK = "torch fp32", "openvino int8 by NNCF", "peak int8"
_OPENVINO_INT8 = "openvino int8"


@dataclass(frozen=True, slots=True)
class SpeedCase:
    """Tower, and the shapes (rows, tokens) to time; images have a fixed number of tokens."""

    tower: str
    variant: str
    modality: Modality
    shapes: tuple[tuple[int, int], ...]


CASES = (
    SpeedCase("ViT-B/32", "xlm-roberta-base-ViT-B-32", Modality.IMAGE, ((1, 1), (8, 1))),
    SpeedCase("XLM-R base", "xlm-roberta-base-ViT-B-32", Modality.TEXT, ((1, 16), (8, 16))),
    SpeedCase("NLLB-600M", "nllb-clip-base", Modality.TEXT, ((1, 16), (8, 16), (8, 64))),
)


@dataclass(frozen=True, slots=True)
class SpeedTarget:
    """Target for the fastest engine: a multiple of PyTorch's speed, or a share of the INT8 peak."""

    precision: Precision
    rows: int
    ratio: float


TARGETS = (
    SpeedTarget(Precision.INT8, 8, 4.0),
    SpeedTarget(Precision.BF16, 8, 2.1),
    SpeedTarget(Precision.FP32, 8, 1.05),
    SpeedTarget(Precision.INT8, 1, 4.8),
)
PEAK_SHARE = 0.8
PORTABLE_RATIO = 1.75
"""Target for INT8 ÷ FP32, both on ONNX Runtime, at 8 rows, on x86 without VNNI."""
_PEAK_SHAPES = {("ViT-B/32", (8, 1)), ("NLLB-600M", (8, 64))}


def cells_by_shape(records: Iterable[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """Return the forms of each tower and shape, in the records' order; others are ignored."""
    cells: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        if "shape" in record.cell:
            cells.setdefault((record.cell["tower"], record.cell["shape"]), {})[record.cell["form"]] = record
    return cells


def share_of_peak(record: Record, peak: Record) -> float:
    """Return operations per second ÷ the INT8 peak of the same turns."""
    giga: float = record.settings["operations_per_run"] / record.settings["rows"] / 1e9
    return paired(record, peak) * giga


def verdicts_of_cells(tower: str, forms: Mapping[str, Record]) -> list[tuple[str, str, str, bool]]:
    """Return the verdicts on one shape of a tower: target, measured value, form, and outcome."""
    rows, tokens = (int(forms[TORCH].settings[key]) for key in ("rows", "tokens"))
    if _OPENVINO_INT8 not in forms:
        return _portable_verdicts(forms, rows=rows, tokens=tokens)
    found = []
    ratios = {name: paired(record, forms[TORCH]) for name, record in forms.items() if name != PEAK}
    for target in TARGETS:
        if target.rows != rows or tokens > 16:
            continue
        best = max(
            (n for n in ratios if n.split()[1] == target.precision and n not in (TORCH, NNCF)),
            key=ratios.__getitem__,
        )
        label = f"{target.precision.value} ≥ {target.ratio}× PyTorch"
        found.append((label, f"{ratios[best]:.2f}×", best, ratios[best] >= target.ratio))
    own = _OPENVINO_INT8
    if (tower, (rows, tokens)) in _PEAK_SHAPES:
        share = share_of_peak(forms[own], forms[PEAK])
        found.append((f"int8 ≥ {PEAK_SHARE:.0%} of the peak", f"{share:.0%}", own, share >= PEAK_SHARE))
    if NNCF in forms:
        ratio = paired(forms[own], forms[NNCF])
        low, high = interval(ratios_by_turn(forms[own], forms[NNCF]))
        found.append(("int8 ≥ NNCF's", f"{ratio:.3f}× ({low:.3f}–{high:.3f})", own, ratio >= 1.0))
    return found


def _portable_verdicts(
    forms: Mapping[str, Record], *, rows: int, tokens: int
) -> list[tuple[str, str, str, bool]]:
    """Return the verdicts for a machine without VNNI."""
    if rows != 8 or tokens > 16:
        return []
    own = "onnxruntime int8"
    ratio = paired(forms[own], forms["onnxruntime fp32"])
    label = f"int8 ≥ {PORTABLE_RATIO}× fp32, both on ONNX Runtime"
    return [(label, f"{ratio:.2f}×", own, ratio >= PORTABLE_RATIO)]
