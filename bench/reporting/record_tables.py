"""Tables of the README and the documentation, rendered from committed records as Markdown.

Every ratio of speeds is the median of the ratios within the turns. Records of different environments are
refused.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.models.samples import SAMPLES
from bench.peers.verdicts import ANY, PeerVerdict, closest_of_verdicts, verdicts_of
from bench.records.record import Record, paired, require_one_environment
from bench.timing.speed_cells import NNCF, PEAK, TORCH, cells_by_shape, share_of_peak
from runtime.cosines import lowest
from runtime.errors import BabeltowerError

__all__ = [
    "corpus_table",
    "costs_table",
    "peer_errors_table",
    "peers_table",
    "portable_speed_table",
    "precisions_table",
    "rates_table",
    "recall_table",
    "server_table",
    "simulated_table",
    "speed_table",
    "summary_table",
]

_NONE = "–"
_COSINE = re.compile(r"cosine (-?[0-9.]+[0-9])")
_WORST = "cosine …"
_ERROR_WIDTH = 200
_FAMILIES = {"nllb-clip": "NLLB-CLIP", "capivara": "CAPIVARA", "altclip": "AltCLIP"}
_ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}
_TOWERS = {
    ("xlm-roberta-base-ViT-B-32", "text"): "XLM-R base",
    ("xlm-roberta-base-ViT-B-32", "image"): "ViT-B/32",
    ("nllb-clip-base", "text"): "NLLB-600M",
}
_VARIANTS = {
    "fp16": "FP16",
    "bf16_openvino": "BF16, OpenVINO",
    "int8_openvino": "INT8, OpenVINO",
}
_VARIANTS_AVX2 = {"int8_onnxruntime": "INT8, ONNX Runtime, on AVX2"}
_FORMS = {
    "onnxruntime fp32": "ONNX Runtime FP32",
    "openvino fp32": "OpenVINO FP32",
    "openvino bf16": "OpenVINO BF16",
    "onnxruntime int8": "ONNX Runtime INT8",
    "openvino int8": "OpenVINO INT8",
}
_SUMMARY_MODELS = ("nllb-clip", "capivara", "altclip")
_SUMMARY_TOWERS = (("NLLB-600M", "8×16"), ("XLM-R base", "8×16"), ("ViT-B/32", "8"))
_SUMMARY_VARIANTS = (
    ("fp32", "onnxruntime"),
    ("fp32", "openvino"),
    ("fp16", "onnxruntime"),
    ("bf16_openvino", "openvino"),
    ("int8_onnxruntime", "onnxruntime"),
    ("int8_openvino", "openvino"),
)
_LOOPS = {"plain": "PyTorch", "open_clip": "open_clip", "sentence-transformers": "sentence-transformers"}
_CORPORA = {
    "captions": "CLDR captions",
    "generated": "generated texts (9 words at the median)",
    "JPEG 640×480": "JPEGs of 640×480",
}
_COSTED = {"generated": "generated texts", "JPEG 640×480": "JPEGs of 640×480"}
_CORES, _DOLLARS_A_CORE_HOUR = 1_000, 0.04


def recall_table(record: Mapping[str, Any]) -> str:
    """Render recall of PyTorch and of FP32 on ONNX Runtime, mean over languages (``bench.precisions``)."""
    rows = []
    for model in _in_order(record["retrieval"]):
        engines = record["retrieval"][model]["fp32"]
        found = next(found for engine, found in engines.items() if engine.startswith("onnxruntime "))
        languages = found["languages"].values()
        cosines = [entry["cosine_min"] for entry in (*languages, found["images"])]
        recalls = [
            " / ".join(
                f"{100 * fmean(entry['text_to_image'][side][k] for entry in languages):.1f}"
                for k in ("1", "10")
            )
            for side in ("reference", "exported")
        ]
        rows.append((f"`{model}`", *recalls, f"{lowest(cosines):.8f}"))
    return _markdown(
        ("checkpoint", "text→image R@1 / R@10, PyTorch", "exported", "lowest cosine of any vector"), rows
    )


def precisions_table(record: Mapping[str, Any], avx2: Mapping[str, Any]) -> str:
    """Render the points of R@1 lost: mean over languages / worst language, each in the worse direction.

    Args:
        record: Record of a machine with VNNI and BF16.
        avx2: Record of a machine with AVX2 alone, for the form that is correct on every CPU.
    """
    lost, lost_avx2 = (
        {(row["model"], row["variant"]): _lost(row) for row in found["rows"]} for found in (record, avx2)
    )
    rows = [
        (
            f"`{model}`",
            *(lost.get((model, variant), _NONE) for variant in _VARIANTS),
            *(lost_avx2.get((model, variant), _NONE) for variant in _VARIANTS_AVX2),
        )
        for model in _in_order({model for model, _ in lost})
    ]
    return _markdown(("checkpoint", *_VARIANTS.values(), *_VARIANTS_AVX2.values()), rows)


def simulated_table(records: Sequence[Record]) -> str:
    """Render R@1 lost by the graphs for CUDA in simulated precisions (``bench.gpu simulate``), in points.

    Losses are means over languages / the worst language, each in the worse direction.
    """
    require_one_environment(records)
    by_cell: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        by_cell.setdefault((record.cell["model"], record.cell["form"]), []).append(record)
    forms = list(dict.fromkeys(form for _, form in by_cell))
    rows = [
        (f"`{model}`", *(cell for form in forms for cell in _simulated(by_cell[model, form])))
        for model in _in_order({model for model, _ in by_cell})
    ]
    heads = [(f"{form}: mean / worst lost", "lowest cosine") for form in forms]
    return _markdown(("checkpoint", *(name for pair in heads for name in pair)), rows)


def _simulated(records: Sequence[Record]) -> tuple[str, str]:
    mean = max(record.settings["reference"] - record.median for record in records)
    worst = max(record.settings["worst_drop"][record.cell["direction"]][0] for record in records)
    cosine = min(
        record.settings[name] for record in records for name in ("text_cosine_min", "image_cosine_min")
    )
    lost = f"{100 * max(mean, 0):.2f} / {100 * worst:.2f}"
    return (
        lost if all(record.settings["passes"] for record in records) else f"{lost}, refused"
    ), f"{cosine:.6f}"


def summary_table(record: Mapping[str, Any], avx2: Mapping[str, Any], speeds: Sequence[Record]) -> str:
    """Render R@1 lost and speed × PyTorch FP32 for each precision and engine.

    Args:
        record: Losses from a machine with VNNI and BF16.
        avx2: Losses from a machine with AVX2 alone; its variants replace those of ``record``.
        speeds: Speeds of full-size towers.
    """
    require_one_environment(speeds)
    lost = {
        (row["model"], row["variant"], row["engine"].split()[0]): _lost(row)
        for found in (record, avx2)
        for row in found["rows"]
    }
    cells = cells_by_shape(speeds)
    rows = []
    for variant, engine in _SUMMARY_VARIANTS:
        precision = variant.split("_")[0]
        losses = (lost.get((model, variant, engine), _NONE) for model in _SUMMARY_MODELS)
        form = f"{engine} {precision}"
        ratios = (_ratio(cells.get(place, {}), form, TORCH) for place in _SUMMARY_TOWERS)
        rows.append((f"{precision.upper()}, {_ENGINES[engine]}", *losses, *ratios))
    models = (f"R@1 lost, `{model}`" for model in _SUMMARY_MODELS)
    towers = (f"speed, {tower}" for tower, _ in _SUMMARY_TOWERS)
    return _markdown(("precision, engine", *models, *towers), rows)


def portable_speed_table(records: Sequence[Record]) -> str:
    """Render the speeds of the forms that are correct without VNNI.

    Each is × PyTorch eager in FP32; INT8 is also ÷ FP32 on ONNX Runtime.
    """
    require_one_environment(records)
    forms_here = ("onnxruntime fp32", "openvino fp32", "onnxruntime int8")
    rows = [
        (
            tower,
            shape,
            *(_ratio(forms, form, TORCH) for form in forms_here),
            _ratio(forms, "onnxruntime int8", "onnxruntime fp32"),
        )
        for (tower, shape), forms in cells_by_shape(records).items()
    ]
    headings = (_FORMS[form] for form in forms_here)
    return _markdown(("tower", "rows × tokens", *headings, "INT8 ÷ FP32, ONNX Runtime"), rows)


def speed_table(records: Sequence[Record]) -> str:
    """Render each form × PyTorch FP32; INT8 also as a share of the peak, and ÷ NNCF's."""
    require_one_environment(records)
    rows = []
    for (tower, shape), forms in cells_by_shape(records).items():
        ratios = [_ratio(forms, form, TORCH) for form in _FORMS]
        own = forms["openvino int8"]
        rows.append(
            (
                tower,
                shape,
                *ratios,
                f"{share_of_peak(own, forms[PEAK]):.0%}",
                _ratio(forms, "openvino int8", NNCF),
            )
        )
    return _markdown(
        ("tower", "rows × tokens", *_FORMS.values(), "of the INT8 peak", "OpenVINO INT8 ÷ NNCF's"), rows
    )


def corpus_table(records: Sequence[Record]) -> str:
    """Render rows per core-second of the pipeline in INT8, and × each loop in FP32."""
    require_one_environment(records)
    rows = []
    for (model, tower, corpus), ways in _ways(records):
        ours = ways["pipeline"]
        times = [
            f"{paired(ours, ways[way]):.1f}" if way in ways and ways[way].error is None else _NONE
            for way in _LOOPS
        ]
        rows.append((_tower(model, tower), _CORPORA.get(corpus, corpus), _rate(ours.median), *times))
    loops = (f"× {name}" for name in _LOOPS.values())
    return _markdown(("tower, INT8", "corpus", "rows a core-second", *loops), rows)


def rates_table(records: Sequence[Record]) -> str:
    """Render the rows per core-second of each step, with the cell of the record."""
    require_one_environment(records)
    rows = []
    for (model, tower, corpus), ways in _ways(records):
        name = _tower(model, tower)
        works = {"pipeline": f"{name} INT8, {_CORPORA.get(corpus, corpus)}, whole pipeline"}
        works |= {
            "tower alone": f"{name} INT8, the tower alone",
            "preprocessing": "decoding and preprocessing",
        }
        for way, work in works.items():
            if way in ways:
                rows.append((work, _rate(ways[way].median), f"`{model}`, {corpus}, {way}"))
    return _markdown(("work", "rows a core-second", "cell of `bench/results/corpus.json`"), rows)


def costs_table(records: Sequence[Record]) -> str:
    """Render the cost of a billion rows at the measured rates."""
    require_one_environment(records)
    rows = []
    for (model, tower, corpus), ways in _ways(records):
        if corpus not in _COSTED:
            continue
        rate = ways["pipeline"].median
        core_s = 1e9 / rate
        rows.append(
            (
                f"10⁹ {_COSTED[corpus]}, {_tower(model, tower)}, {_rate(rate)} a core-second",
                f"{core_s / 1e6:.1f} million",
                f"{core_s / _CORES / 3600:.1f} hours",
                f"${core_s / 3600 * _DOLLARS_A_CORE_HOUR:,.0f}",
            )
        )
    head = ("", "core-seconds", f"on {_CORES:,} cores", f"at ${_DOLLARS_A_CORE_HOUR:.2f} a core-hour")
    return _markdown(head, rows)


def server_table(records: Sequence[Record]) -> str:
    """Render texts per second of both servers and in process, from ``bench.server_load``."""
    require_one_environment(records)
    in_process = ("in process", "in process, as many at a time")
    models: dict[str, dict[str, Record]] = {}
    for record in records:
        by = record.cell["by"].removeprefix("babeltower ")
        models.setdefault(record.cell["model"], {})[by] = record
    rows = []
    for model, ways in models.items():
        server, found = ways["server"], ways["server"].settings
        rows.append(
            (
                f"`{model}`, {_form(server)}",
                *(_rate(ways[way].median) for way in ("server", "server, unbatched", *in_process)),
                f"{paired(server, ways['server, unbatched']):.2f}",
                " / ".join(f"{paired(server, ways[way]):.0%}" for way in in_process),
                f"{found['tower_average_batch']:.1f}",
                f"{found['padding_share']:.1%}",
                f"{found['p50_ms']:.0f} / {found['p99_ms']:.0f}",
                f"{found['max_error']:.0e}".replace("e-0", "e-").replace("e+00", ""),
            )
        )
    clients = " or ".join(sorted({str(record.settings["clients"]) for record in records}))
    rates = (
        "server, texts/s",
        "unbatched",
        "in process: all at once",
        f"{clients} at a time",
        "× unbatched",
        "of both in process",
    )
    counts = ("rows a run", "padding", "p50 / p99, ms", "largest error")
    return _markdown(("model", *rates, *counts), rows)


def peers_table(records: Sequence[Record]) -> str:
    """Render babeltower beside the best peer, a row per family, tower, start and batch.

    Peers are compared at each precision and at any. A ratio is the peer's time ÷ babeltower's, with its
    interval; if babeltower is not ahead, the cell says so.
    """
    best: dict[tuple[str, ...], dict[str, PeerVerdict]] = {}
    for verdict in closest_of_verdicts(verdicts_of(records)):
        best.setdefault(verdict.place, {})[verdict.precision] = verdict
    rows = []
    for (family, _, tower, tokens, batch), verdicts in best.items():
        own = verdicts[ANY].own
        rows.append(
            (
                _start(family, tower, tokens),
                batch,
                f"{_rate(1000 * int(batch) / own.median)}, {_form(own)}",
                *(_beside(verdicts.get(precision)) for precision in ("fp32", "bf16", "int8", ANY)),
            )
        )
    head = ("tower", "rows", "babeltower's best, rows a core-second", "× at FP32", "× at BF16", "× at INT8")
    return _markdown((*head, "× at any precision"), rows)


def peer_errors_table(records: Sequence[Record]) -> str:
    """Render the towers that a peer cannot run, with its error message.

    Long messages are cut; for wrong vectors, the worst cosine is shown.
    """
    where: dict[tuple[str, str], dict[str, None]] = {}
    cosines: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if record.error is not None:
            cell = record.cell
            start = _start(cell["family"], cell["tower"], cell["tokens"])
            words = textwrap.shorten(record.error.replace("|", "\\|"), _ERROR_WIDTH, placeholder=" …")
            key = (cell["by"], _COSINE.sub(_WORST, words))
            where.setdefault(key, {})[start] = None
            cosines.setdefault(key, []).extend(float(found) for found in _COSINE.findall(words))
    rows = []
    for key, starts in where.items():
        by, words = key
        if cosines[key]:
            words = words.replace(_WORST, f"cosine {min(cosines[key]):.2f}")
        rows.append((by, "; ".join(starts), words))
    return _markdown(("peer", "cannot run", "why"), rows)


def _start(family: str, tower: str, tokens: str) -> str:
    begins = {"": "pixels", "strings": "strings", "files": "files"}.get(tokens, f"{tokens} tokens")
    return f"{_FAMILIES.get(family, family)} {tower}, from {begins}"


def _beside(verdict: PeerVerdict | None) -> str:
    if verdict is None:
        return _NONE
    peer = verdict.peer.cell
    name = peer["by"]
    if verdict.precision == ANY and peer["precision"] not in name:
        name += f", {peer['precision'].upper()}"
    ratio = f"{verdict.ratio:.2f} ({verdict.low:.2f}–{verdict.high:.2f})"
    return f"{ratio} {name}" if verdict.word == "ahead" else f"**{ratio}, {verdict.word}** {name}"


def _lost(row: Mapping[str, Any]) -> str:
    sides = [row[side] for side in ("text_to_image", "image_to_text")]
    mean, worst = (max(side[f"{kind}_drop_points"] for side in sides) for kind in ("mean", "worst"))
    return f"{max(mean, 0):.2f} / {worst:.2f}"


def _in_order(models: Iterable[str]) -> list[str]:
    """Return the samples in the order of the tables, then others."""
    rank = {model: i for i, model in enumerate(SAMPLES)}
    return sorted(models, key=lambda model: (rank.get(model, len(rank)), model))


def _ratio(forms: Mapping[str, Record], over: str, under: str) -> str:
    if over not in forms or under not in forms:
        return _NONE
    return f"{paired(forms[over], forms[under]):.2f}"


def _ways(records: Sequence[Record]) -> Iterable[tuple[tuple[str, str, str], dict[str, Record]]]:
    """Return the ways of each model, tower and corpus."""
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        cell = record.cell
        if "way" not in cell:
            raise BabeltowerError(
                f"{dict(cell)} is not a cell of a full-size corpus; measure with --work FOLDER."
            )
        found.setdefault((cell["model"], cell["tower"], cell["corpus"]), {})[cell["way"]] = record
    return found.items()


def _tower(model: str, tower: str) -> str:
    return _TOWERS.get((model, tower), f"{model} {tower}")


def _form(record: Record) -> str:
    engine = record.cell["engine"]
    return f"{_ENGINES.get(engine, engine)} {record.cell['precision'].upper()}"


def _rate(value: float) -> str:
    """Format a rate with three significant digits."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:#.3g}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    return "".join([lines[0], "|---" * len(head) + "|\n", *lines[1:]])
