"""Short text of a run: a line per peak, per judged form, and per tower and shape."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bench.gpu.comparison import PeerRatios, comparisons_of, packed_ratios
from bench.gpu.results import records_of_line

__all__ = ["summary_of_lines"]

_LONGEST = 200
_N_ERRORS = 12


def summary_of_lines(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Return the text of a run's lines, errors last."""
    for line in lines:
        if line.get("step") == "machine":
            yield f"{line['gpu']}, driver {line['driver']}, torch {line['torch']}, ORT {line['onnxruntime']}"
    peaks = [line for line in lines if line.get("step") == "peak" and "samples" in line]
    yield "; ".join(f"{p['name']} {statistics.median(p['samples']):,.0f} {p['unit']}" for p in peaks)
    tried = [line for line in lines if line.get("step") == "smoke" and "cosine" in line]
    for tower in dict.fromkeys(line["tower"] for line in tried):
        forms = [f"{line['what']} {line['cosine']:.6f}" for line in tried if line["tower"] == tower]
        yield f"{tower}, cosines with the processor: {'; '.join(forms)}"
    for line in lines:
        if line.get("step") == "gate" and "passes" in line:
            yield _gate_text(line)[:_LONGEST]
    yield "ms: device (call, NumPy to NumPy)"
    speeds = [line for line in lines if line.get("step") == "speed" and "samples" in line]
    for tower, shape in dict.fromkeys((line["tower"], line["shape"]) for line in speeds):
        cells = [_cell(line) for line in speeds if (line["tower"], line["shape"]) == (tower, shape)]
        yield f"{tower} {shape}: {'; '.join(cells)}"
    records = [record for line in lines for record in records_of_line(line)]
    for found in comparisons_of(records):
        yield _comparison_text(found)
    for packed in packed_ratios(records):
        yield (
            f"{packed.model} {packed.shape} {packed.precision}, {packed.metric}: packed texts are "
            f"{packed.ratio:.2f}× as fast as padded ones"
        )
    seconds = [line["seconds"] for line in lines if line.get("step") == "compile" and "seconds" in line]
    if seconds:
        yield f"PyTorch compiled {len(seconds)} shapes, {max(seconds):.0f} s the slowest"
    errors = [line for line in lines if "error" in line]
    for line in errors[:_N_ERRORS]:
        where = " ".join(str(line[key]) for key in ("step", "tower", "model", "what") if line.get(key))
        yield f"! {where}: {line['error']}"[: 2 * _LONGEST]
    if len(errors) > _N_ERRORS:
        yield f"! and {len(errors) - _N_ERRORS} more errors"


def _gate_text(line: dict[str, Any]) -> str:
    recall = ", ".join(f"{100 * a:.2f} → {100 * b:.2f}" for a, b in line["mean_recall_at_1"].values())
    found = "passes" if line["passes"] else "FAILS"
    cosines = f"{line['text_cosine_min']:.6f}, {line['image_cosine_min']:.6f}"
    faults = " ".join(line["faults"][:1])
    return f"{line['model']} {line['form']}: {found}, R@1 % {recall}, cosines ≥ {cosines} {faults}"


def _comparison_text(found: PeerRatios) -> str:
    facts = [] if found.tokens_per_s is None else [f"{found.tokens_per_s:,.0f} tokens/s"]
    for ratio, name in ((found.eager, "torch"), (found.compiled, "torch compiled")):
        facts += [] if ratio is None else [f"{ratio:.2f}× {name}"]
    facts += [] if found.limit is None else [f"{100 * found.limit:.0f} % of the limit"]
    return f"{found.model} {found.shape} {found.precision}, {found.metric}: {', '.join(facts) or 'no peer'}"


def _cell(line: dict[str, Any]) -> str:
    medians = {name: statistics.median(samples) for name, samples in line["samples"].items()}
    device = medians.pop("device", None)
    others = ", ".join(f"{ms:.3g}" for ms in medians.values())
    name = line["by"].replace("babeltower", "").replace("PyTorch", "torch").strip(", ")
    shown = "–" if device is None else f"{device:.3g}"
    return f"{name} {line['precision']} {shown}".strip() + (f" ({others})" if others else "")
