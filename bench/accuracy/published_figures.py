"""Published figures to show beside a run: kept separate, always with source and protocol.

They are shown if the data set and the model are the same: by the model's published name or, if the folder's
name does not show it, by its architecture, in which case the report says so. Figures by language are in
``bench/published/``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from bench.accuracy.retrieval_report import ModelFacts

__all__ = ["PUBLISHED", "PublishedFigures", "published_beside", "published_by_language", "published_figures"]

_FOLDER = Path(__file__).resolve().parents[1] / "published"


@dataclass(frozen=True, slots=True)
class PublishedFigures:
    """Figures that a source reports for one model on one data set, in percent.

    Attributes:
        dataset: Name of the layout.
        model: Published name of the model.
        measures: Names of ``values``.
        values: Value of each measure; means over the languages if there are several.
        protocol: Measurement protocol, where protocols differ.
        source: Place of publication.
        asked: Note that a run with the same protocol has; empty if every run has it.
        by_language: Values of the measures by the data set's own language codes; empty if not published.
        named: True if the run's checkpoint has the model's published name.
    """

    dataset: str
    model: str
    measures: tuple[str, ...]
    values: tuple[float, ...]
    protocol: str
    source: str
    asked: str = ""
    by_language: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    named: bool = False

    def __str__(self) -> str:
        whose = self.model if self.named else f"{self.model}, of the same architecture"
        over = f", mean of {len(self.by_language)} languages" if self.by_language else ""
        values = ", ".join(f"{m} {v:.1f}" for m, v in zip(self.measures, self.values, strict=True))
        return f"{whose}: {values}{over} ({self.protocol}; {self.source})"

    def of(self, code: str, measure: str) -> float | None:
        """Return one language's value of a measure, or ``None`` if it is not published."""
        values = self.by_language.get(code)
        return (
            None if values is None or measure not in self.measures else values[self.measures.index(measure)]
        )


@dataclass(frozen=True, slots=True)
class _Model:
    architecture: str
    hub_names: tuple[str, ...]


_ALTCLIP = "XLM-R 1024x24 + ViT 1024x24/14"
_XLM_R = "xlm-roberta-base-ViT-B-32"

_MODELS: Mapping[str, _Model] = MappingProxyType(
    {
        "nllb-clip-base": _Model("nllb-clip-base", ("visheratin/nllb-clip-base-oc",)),
        "nllb-clip-large": _Model("nllb-clip-large", ("visheratin/nllb-clip-large-oc",)),
        "nllb-clip-base-siglip": _Model("nllb-clip-base-siglip", ("visheratin/nllb-clip-base-siglip",)),
        "nllb-clip-large-siglip": _Model("nllb-clip-large-siglip", ("visheratin/nllb-clip-large-siglip",)),
        "nllb-siglip-mrl-base": _Model("nllb-clip-base-siglip", ("visheratin/nllb-siglip-mrl-base",)),
        "nllb-siglip-mrl-large": _Model("nllb-clip-large-siglip", ("visheratin/nllb-siglip-mrl-large",)),
        "AltCLIP": _Model(_ALTCLIP, ("BAAI/AltCLIP",)),
        "AltCLIP-m9": _Model(_ALTCLIP, ("BAAI/AltCLIP-m9",)),
        "CAPIVARA": _Model(_XLM_R, ("hiaac-nlp/CAPIVARA",)),
        "CAPIVARA + Opt.": _Model(_XLM_R, ("hiaac-nlp/CAPIVARA-Opt", "hiaac-nlp/CAPIVARA-LoRA")),
        "xlm-roberta-base-ViT-B-32": _Model(
            _XLM_R, ("laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k",)
        ),
    }
)
"""Published models: architectures as manifests name them, and the names of their checkpoints."""

_FLAGAI = (
    "five captions an image; any in the top k",
    "github.com/FlagAI-Open/FlagAI, examples/AltCLIP/README.md",
)
_BOTH = tuple(f"{way} R@{k}" for way in ("text→image", "image→text") for k in (1, 5, 10))
_MEAN_RECALL = ("text→image mean recall, pt", "image→text mean recall, pt")
_CAPIVARA = "github.com/hiaac-nlp/CAPIVARA, README (arXiv 2310.13683)"

PUBLISHED: tuple[PublishedFigures, ...] = (
    PublishedFigures("flickr30k-cn", "AltCLIP", _BOTH, (69.8, 89.9, 94.7, 84.8, 97.4, 98.8), *_FLAGAI),
    *(
        PublishedFigures(
            "capivara", model, _MEAN_RECALL, values, f"on {data}; mean over k = 1, 5, 10", _CAPIVARA
        )
        for model, rows in (
            ("CAPIVARA", ((79.56, 89.95), (56.27, 71.24), (66.40, 64.75))),
            ("CAPIVARA + Opt.", ((79.39, 89.13), (55.49, 69.26), (66.89, 67.93))),
            ("xlm-roberta-base-ViT-B-32", ((76.23, 87.93), (52.62, 66.55), (65.36, 69.43))),
        )
        for data, values in zip(("Flickr30k", "MS COCO", "PraCegoVer"), rows, strict=True)
    ),
)
"""Figures of whole data sets; those by language are read from ``bench/published/``."""


@dataclass(frozen=True, slots=True)
class _Table:
    dataset: str
    file: str
    protocol: str
    source: str
    asked: str = ""


_BABEL = "github.com/gregor-ge/Babel-ImageNet, results/ (arXiv 2306.08658)"
_OPEN_CLIP = "github.com/mlfoundations/open_clip, docs/openclip_multilingual_retrieval_results.csv"
_TABLES = (
    _Table("babel-imagenet", "babel_imagenet.csv", "FP16 autocast; the paper's language map", _BABEL),
    _Table("xtd10", "xtd10.csv", "FP16 autocast; the paper's language map", _BABEL),
    _Table("xtd10", "xtd10_open_clip.csv", "CLIP_benchmark; the paper's language map", _OPEN_CLIP),
    _Table(
        "crossmodal3600",
        "crossmodal3600_all.csv",
        "all captions; FP16 autocast; the paper's language map",
        _BABEL,
        "all captions of an image count",
    ),
    _Table(
        "crossmodal3600",
        "crossmodal3600_first.csv",
        "first captions alone; CLIP_benchmark; the paper's language map",
        _OPEN_CLIP,
        "the first caption of an image counts",
    ),
)


def published_figures(
    dataset: str, model: ModelFacts, notes: Sequence[str] = ()
) -> tuple[PublishedFigures, ...]:
    """Return published figures of a run's model on its data set.

    Those of the named model if there are any, otherwise those of models with the same architecture.

    Args:
        notes: Notes of the run; if a data set has several protocols, they tell which one was used.
    """
    name = model.checkpoint.rpartition("/")[2]
    found = []
    for entry in (*PUBLISHED, *published_by_language()):
        published = _MODELS[entry.model]
        asked = entry.asked in " ".join(notes)
        if entry.dataset == dataset and asked and published.architecture == model.architecture:
            known = {entry.model, *(hub.rpartition("/")[2] for hub in published.hub_names)}
            found.append(replace(entry, named=name in known))
    named = [entry for entry in found if entry.named]
    return tuple(named or found)


def published_beside(figures: Sequence[PublishedFigures], measure: str) -> PublishedFigures | None:
    """Return the figures to show by language: the named model's, or the only candidate's."""
    able = [entry for entry in figures if entry.by_language and measure in entry.measures]
    return able[0] if able and (able[0].named or len({entry.model for entry in able}) == 1) else None


@lru_cache(maxsize=1)
def published_by_language() -> tuple[PublishedFigures, ...]:
    """Return all figures in ``bench/published/``."""
    return tuple(figures for table in _TABLES for figures in _figures_of(table))


def _figures_of(table: _Table) -> list[PublishedFigures]:
    """Return one entry per model and set of languages.

    Babel-ImageNet has 298 languages, and translated prompts in 90 of them.
    """
    with (_FOLDER / table.file).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    models = [column for column in rows[0] if column not in ("language", "measure")]
    languages: dict[str, tuple[str, ...]] = {}
    for row in rows:
        languages[row["measure"]] = (*languages.get(row["measure"], ()), row["language"])
    found = []
    for model in models:
        value = {(row["language"], row["measure"]): float(row[model]) for row in rows}
        for codes in dict.fromkeys(languages.values()):
            measures = tuple(measure for measure, of in languages.items() if of == codes)
            by_language = {code: tuple(value[code, measure] for measure in measures) for code in codes}
            means = tuple(sum(column) / len(codes) for column in zip(*by_language.values(), strict=True))
            found.append(
                PublishedFigures(
                    table.dataset,
                    model,
                    measures,
                    means,
                    table.protocol,
                    table.source,
                    table.asked,
                    by_language,
                )
            )
    return found
