"""Render a run's record as one page: tables, and pictures as PNG files beside it."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu.comparison import (
    PeerRatios,
    comparisons_of,
    floor_ms,
    packed_ratios,
    peaks_of,
    shape_of,
    speeds_of,
)
from bench.gpu.towers import CAPTIONS
from bench.records.record import Record, read_records

__all__ = ["write_report"]

_METRICS = {
    "device": "on the device, launching left out",
    "call": "a call, inputs and outputs in the device's memory",
    "wall": "from NumPy to NumPy",
}
_STYLE = (
    "body{font:15px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2330}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;text-align:right;"
    "border-bottom:1px solid #d7dce3}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def write_report(record: Path, out: Path) -> None:
    """Write ``index.html`` and its pictures to a folder."""
    records = read_records(record)
    out.mkdir(parents=True, exist_ok=True)
    card = records[0].machine
    parts = [f"<h1>{html.escape(str(card.get('gpu')))}</h1>", _environment(records[0])]
    parts += [*_peaks(records), *_gate(records)]
    peaks, compared = peaks_of(records), list(comparisons_of(records))
    for model in _models(records):
        chosen = [r for r in speeds_of(records) if r.cell["model"] == model]
        for metric, words in _METRICS.items():
            found = [r for r in chosen if r.cell["metric"] == metric]
            if not found:
                continue
            name = f"{model.replace('/', '').replace(' ', '-').lower()}-{metric}.png"
            drawn = [r for r in found if r.cell.get("load") != CAPTIONS]  # many runs, not one
            _picture(drawn, peaks, f"{model}: ms {words}", out / name)
            parts += [f"<h2>{html.escape(model)}, {words}</h2>", f'<img src="{name}" alt="{name}">']
            parts.append(_speed_table(found, peaks, floors=metric == "device"))
            parts.append(_comparison_table([c for c in compared if (c.model, c.metric) == (model, metric)]))
    parts += _packed(records)
    page = f"<!doctype html><meta charset=utf-8><title>GPU</title><style>{_STYLE}</style>" + "\n".join(parts)
    (out / "index.html").write_text(page, encoding="utf-8")


def _environment(record: Record) -> str:
    facts = {**record.machine, **record.versions, "commit": record.commit}
    names = ("driver", "cuda", "torch", "onnxruntime", "cpu", "n_cores", "commit")
    return "<p>" + " · ".join(f"{name} {html.escape(str(facts.get(name)))}" for name in names) + "</p>"


def _peaks(records: Sequence[Record]) -> Iterator[str]:
    found = [r for r in records if r.cell.get("suite") == "peaks" and r.error is None]
    rows = [(r.cell["precision"], f"{r.median:,.0f}", r.unit) for r in found]
    yield "<h2>Peaks</h2>" + _table(("peak", "median", "unit"), rows)


def _gate(records: Sequence[Record]) -> Iterator[str]:
    rows = []
    for record in records:
        if record.cell.get("suite") != "gate":
            continue
        facts = record.settings
        drop, code = facts["worst_drop"][record.cell["direction"]]
        rows.append(
            (
                f"{record.cell['model']} {record.cell['form']}, {record.cell['direction'].replace('_', ' ')}",
                f"{100 * facts['reference']:.2f} %",
                f"{100 * record.median:.2f} %",
                f"{100 * drop:.2f} ({code})",
                f"{facts['text_cosine_min']:.6f}",
                f"{facts['image_cosine_min']:.6f}",
                "passes" if facts["passes"] else html.escape("; ".join(facts["faults"])),
            )
        )
    head = ("model", "R@1 reference", "R@1", "largest drop", "cosine of texts ≥", "of images ≥", "gate")
    if rows:
        yield "<h2>Parity gate</h2>" + _table(head, rows)


def _speed_table(records: Sequence[Record], peaks: dict[str, float], *, floors: bool) -> str:
    """Return a table of one tower: a row per shape, a column per contender, and the share of the limit."""
    contenders = list(dict.fromkeys(_contender(r) for r in records))
    rows = []
    for shape in dict.fromkeys(shape_of(r) for r in records):
        cells = {_contender(r): r for r in records if shape_of(r) == shape}
        row = [shape]
        for name in contenders:
            if (record := cells.get(name)) is None:
                row.append("–")
                continue
            p99 = sorted(record.samples)[-1 - len(record.samples) // 100]
            text = f"{record.median:.3f} ({p99:.3f})"
            floor = floor_ms(record, peaks) if floors else None
            row.append(text + (f" · {100 * floor / record.median:.0f} %" if floor else ""))
        rows.append(tuple(row))
    note = "median (p99)" + (" · share of the limit" if floors else "")
    return f"<p>{note}</p>" + _table(("shape", *contenders), rows)


def _comparison_table(comparisons: Sequence[PeerRatios]) -> str:
    """Return the table of the product against PyTorch in one precision; empty if it was not timed."""
    rows = [
        (
            f"{found.shape}, {found.precision}",
            "–" if found.tokens_per_s is None else f"{found.tokens_per_s:,.0f}",
            *("–" if ratio is None else f"{ratio:.2f}×" for ratio in (found.eager, found.compiled)),
            "–" if found.limit is None else f"{100 * found.limit:.0f} %",
        )
        for found in comparisons
    ]
    head = ("babeltower", "tokens/s", "faster than PyTorch", "than PyTorch compiled", "share of the limit")
    return _table(head, rows) if rows else ""


def _packed(records: Sequence[Record]) -> Iterator[str]:
    """Return the table of packed texts beside padded ones; empty if they were not timed."""
    found = list(packed_ratios(records))
    if not found:
        return
    rows = [
        (
            f"{packed.model} {packed.shape}, {packed.precision}, {packed.metric}",
            f"{packed.padded_ms:.3f}",
            f"{packed.packed_ms:.3f}",
            f"{packed.ratio:.2f}×",
            "yes" if packed.ratio > 1 else "no",
        )
        for packed in found
    ]
    yield "<h2>Packed texts (--packed-text)</h2>"
    yield "<p>Texts of one length have no padding to remove; captions are run as those of a corpus.</p>"
    yield _table(("tower, shape, metric", "padded, ms", "packed, ms", "as fast as padded", "pays"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def _picture(records: Sequence[Record], peaks: dict[str, float], title: str, path: Path) -> None:
    """Draw median time per shape, a line per contender, and the floor of FP16 dashed; both axes log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.6), layout="constrained")
    shapes = sorted(dict.fromkeys(shape_of(r) for r in records), key=_order)
    for name in dict.fromkeys(_contender(r) for r in records):
        medians = {shape_of(r): r.median for r in records if _contender(r) == name}
        at = [index for index, shape in enumerate(shapes) if shape in medians]
        axis.plot(at, [medians[shapes[index]] for index in at], marker="o", label=name)
    floors = {
        shape_of(r): floor for r in records if r.cell["precision"] == "fp16" and (floor := floor_ms(r, peaks))
    }
    if floors:
        at = [index for index, shape in enumerate(shapes) if shape in floors]
        values = [floors[shapes[index]] for index in at]
        axis.plot(at, values, "k--", linewidth=1, label="limit in FP16")
    axis.set_yscale("log")
    axis.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
    axis.set_title(title)
    axis.set_ylabel("ms")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _models(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r.cell["model"] for r in speeds_of(records)))


def _contender(record: Record) -> str:
    return f"{record.cell['by']} {record.cell['precision']}"


def _order(shape: str) -> tuple[int, int, str]:
    rows, _, tokens = shape.partition(" ")[0].partition("×")
    return int(tokens or 0), int(rows), shape
