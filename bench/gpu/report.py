"""Render a run's record as one page: tables, and pictures as PNG files beside it."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.records.record import Record, read_records

__all__ = ["floor_ms", "write_report"]

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
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
    peaks = _medians(records)
    for model in _models(records):
        chosen = [r for r in _speeds(records) if r.cell["model"] == model]
        for metric, words in _METRICS.items():
            found = [r for r in chosen if r.cell["metric"] == metric]
            if not found:
                continue
            name = f"{model.replace('/', '').replace(' ', '-').lower()}-{metric}.png"
            _picture(found, peaks, f"{model}: ms {words}", out / name)
            parts += [f"<h2>{html.escape(model)}, {words}</h2>", f'<img src="{name}" alt="{name}">']
            parts.append(_speed_table(found, peaks, floors=metric == "device"))
    page = f"<!doctype html><meta charset=utf-8><title>GPU</title><style>{_STYLE}</style>" + "\n".join(parts)
    (out / "index.html").write_text(page, encoding="utf-8")


def floor_ms(record: Record, peaks: dict[str, float]) -> float | None:
    """Return the least time of a cell: its products at the measured peak, or its weights at the bandwidth."""
    precision = record.cell["precision"]
    if precision not in peaks or "copy" not in peaks:
        return None
    products = record.settings["operations"] / (peaks[precision] * 1e9)
    weights = record.settings["product_weights"] * _BYTES[precision] / (peaks["copy"] * 1e9)
    return 1000 * float(max(products, weights))


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
    for shape in dict.fromkeys(_shape(r) for r in records):
        cells = {_contender(r): r for r in records if _shape(r) == shape}
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
    shapes = sorted(dict.fromkeys(_shape(r) for r in records), key=_order)
    for name in dict.fromkeys(_contender(r) for r in records):
        medians = {_shape(r): r.median for r in records if _contender(r) == name}
        at = [index for index, shape in enumerate(shapes) if shape in medians]
        axis.plot(at, [medians[shapes[index]] for index in at], marker="o", label=name)
    floors = {
        _shape(r): floor for r in records if r.cell["precision"] == "fp16" and (floor := floor_ms(r, peaks))
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


def _speeds(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.cell.get("suite") == "gpu" and r.error is None]


def _models(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r.cell["model"] for r in _speeds(records)))


def _medians(records: Sequence[Record]) -> dict[str, Any]:
    peaks = [r for r in records if r.cell.get("suite") == "peaks" and r.error is None]
    return {r.cell["precision"]: r.median for r in peaks}


def _contender(record: Record) -> str:
    return f"{record.cell['by']} {record.cell['precision']}"


def _shape(record: Record) -> str:
    cell = record.cell
    text = f"{cell['batch']}×{cell['tokens']}" if cell["tokens"] else cell["batch"]
    return f"{text} {cell['load']}" if cell.get("load") else text


def _order(shape: str) -> tuple[int, int, str]:
    rows, _, tokens = shape.partition(" ")[0].partition("×")
    return int(tokens or 0), int(rows), shape
