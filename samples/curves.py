"""What a whole training reached in which CPU time: ``curves.json``, and its table for ``README.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = Sequence[Mapping[str, float]]
"""Points of one run, as ``ResumableRun.record`` writes them."""

PATH = Path(__file__).resolve().parent / "curves.json"
IMAGE_RUNS = {
    "teacher": "teacher",
    "clip": "image tower",
    "clip-again": "the same, on",
    "siglip": "SigLIP's image tower",
    "siglip-again": "the same, on",
}
TEXT_RUNS = {
    "nllb": "NLLB-CLIP's texts",
    "nllb-again": "the same, on",
    "xlmr": "CAPIVARA's texts, all languages",
    "xlmr-again": "the same, on",
    "capivara": "CAPIVARA's texts, more Portuguese",
    "capivara-lora": "its adapter",
    "altclip": "AltCLIP's texts",
    "altclip-again": "the same, on",
}
RUNS = {**IMAGE_RUNS, **TEXT_RUNS}
POINTS_OF_IMAGE_RUNS = 4


def write_curves(folder: Path, path: Path = PATH) -> None:
    """Collect the curves of a whole training from its work folder."""
    curves = {name: _read(folder / f"{name}.curve.jsonl") for name in RUNS}
    lines = ",\n".join(
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(point)}" for point in curve) + "\n ]"
        for name, curve in curves.items()
    )
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _read(path: Path) -> Curve:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table_from_curves(curves: Mapping[str, Curve]) -> str:
    """Render some points of the image runs, and the last of the others, as a Markdown table."""
    rows = [
        "| run | step | CPU minutes | drawing finds its emoji, first / among ten | caption finds its emoji |",
        "|---|---|---|---|---|",
    ]
    for name, title in RUNS.items():
        curve = curves[name]
        n_points = min(len(curve), POINTS_OF_IMAGE_RUNS) if name in IMAGE_RUNS else 1
        for index in range(n_points):
            point = curve[(index + 1) * len(curve) // n_points - 1]
            drawings = f"{point['top_1']:.2f} / {point['top_10']:.2f}" if "top_1" in point else "–"
            captions = f"{point['own_prototype_first']:.2f}" if "own_prototype_first" in point else "–"
            minutes = point["cpu_s"] / 60
            rows.append(f"| {title} | {point['step']:,} | {minutes:.1f} | {drawings} | {captions} |")
    return "\n".join(rows)
