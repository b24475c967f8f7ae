"""A checkpoint in INT8: what each product costs, the fewest that must stay FP32, then through the gate."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.checkpoint import towers_from_checkpoint
from export.onnx_graph import onnx_from_tower
from export.parity.gate import GateReference, gate_reference
from export.parity.limits import LIMITS
from export.precision.calibration import CalibrationSet, CalibrationSize, calibration_from_path
from export.precision.clipping import ClipMethod
from export.precision.int8 import GraphTarget, Int8Recipe, recipe_for
from export.repository import (
    Export,
    ExportOptions,
    installed_engines,
    name_of_checkpoint,
    repository_from_towers,
    require_free,
)
from export.retrieval.sample_set import sample_retrieval_set
from export.retrieval.sets import RetrievalSet
from export.retrieval.vectors import Progress
from export.retrieval.verdict import RetrievalLimits
from export.sensitivity.costs import Product, ProductCost, costs_of_products, probe_from_graphs
from export.sensitivity.report import SensitivityReport, write_report
from export.sensitivity.trials import Trial, Trials, fewest_kept, inputs_of_reference
from export.towers import Towers
from export.triton.tower_folders import tower_metadata
from export.variants import forms_for
from runtime.errors import ExportError, ParityError
from runtime.manifest import GRAPH_ENGINES, TOKENIZER_FILE, Engine, Modality, Precision
from runtime.preprocessing.text import Tokenizer

__all__ = [
    "QuantiseOptions",
    "Quantised",
    "Study",
    "accepted_trial",
    "quantised_from_checkpoint",
    "recipe_from_options",
    "study_of_towers",
]

_PROBE = CalibrationSize(n_texts=1_024, n_images=256)
_PLOTTED = (0, 1, 2, 4, 8)


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True)
class QuantiseOptions:
    """How to quantise.

    Attributes:
        max_recall_drop: Share of recall at 1 that may be lost, mean over the languages, in either direction.
            What exceeds the precision's own limit is recorded in the manifest as accepted.
        min_share_int8: Of the multiply–adds of either tower; with less it would be INT8 in name alone.
        recipe: Clipping, smoothing and token table; the engine's default if ``None``. What it keeps is
            chosen here.
        calibration: Parquet file or folder of images; the samples' training split if ``None``.
        captions_per_language: That recall is measured on; ``None`` for all.
        report: Where to write the tables and the plot, without suffix; beside the model if ``None``.
    """

    engine: Engine
    max_recall_drop: float = 0.005
    min_share_int8: float = 0.5
    recipe: Int8Recipe | None = None
    calibration: Path | None = None
    calibration_size: CalibrationSize = field(default_factory=CalibrationSize)
    captions_per_language: int | None = 200
    retrieval_set: RetrievalSet | None = None
    replace: bool = False
    report: Path | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in GRAPH_ENGINES:
            raise ExportError(
                f"{self.engine.value} runs plans, which only a GPU can try; expected one of "
                f"{[engine.value for engine in GRAPH_ENGINES]}."
            )
        if not 0 < self.max_recall_drop < 1:
            raise ExportError(f"A drop of {self.max_recall_drop} is no limit; expected a share, 0 to 1.")

    @property
    def recipe_to_use(self) -> Int8Recipe:
        """The recipe, for the engine, keeping nothing yet."""
        target = GraphTarget(self.engine.value)
        return dataclasses.replace(self.recipe or recipe_for(target), target=target, kept=())

    @property
    def limits(self) -> RetrievalLimits:
        """What trials are held to: the precision's own, with the mean that was asked for."""
        own = LIMITS[Precision.INT8].retrieval
        return dataclasses.replace(
            own,
            max_mean_drop=self.max_recall_drop,
            max_recall_drop=max(own.max_recall_drop, self.max_recall_drop),
            max_later_recall_drop=max(own.max_later_recall_drop, self.max_recall_drop),
            sampled=self.captions_per_language is not None,
        )


@dataclass(frozen=True, slots=True)
class Quantised:
    """What was published, what it was chosen from, and where that is written."""

    export: Export
    report: SensitivityReport
    files: tuple[Path, ...]


def recipe_from_options(
    engine: Engine, *, method: str | None, percentile: float | None, smooth: float | None
) -> Int8Recipe:
    """An engine's default recipe, with what was asked for instead.

    Raises:
        ExportError: no such method, or a value out of its range.
    """
    recipe = recipe_for(GraphTarget(engine.value))
    if method is not None:
        if method not in [known.value for known in ClipMethod]:
            raise ExportError(f"No clipping {method!r}; expected one of {[m.value for m in ClipMethod]}.")
        recipe = dataclasses.replace(recipe, method=ClipMethod(method))
    if percentile is not None:
        if recipe.method is not ClipMethod.PERCENTILE:
            raise ExportError(
                f"A percentile says nothing to {recipe.method.value}; pass --method percentile."
            )
        recipe = dataclasses.replace(recipe, percentile=percentile)
    return recipe if smooth is None else dataclasses.replace(recipe, smooth=smooth)


def quantised_from_checkpoint(
    checkpoint: str | Path,
    repository: str | Path,
    options: QuantiseOptions,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    progress: Progress = _silent,
) -> Quantised:
    """Publish REPOSITORY/NAME in INT8 for one engine, with as few products in FP32 as the limit allows.

    Args:
        checkpoint: Folder, ``.ckpt`` file or hub name.
        name: The checkpoint's own name by default.
        base: The checkpoint below a LoRA adapter.

    Raises:
        ParityError: no choice meets the limit, or the gate refuses the variant; the tables are written.
        BabeltowerError: whatever reading the checkpoint or the calibration data, or exporting, raises.
    """
    name = name or name_of_checkpoint(checkpoint)
    forms = forms_for([Precision.INT8], [options.engine], installed=installed_engines())
    own = LIMITS[Precision.INT8].retrieval.max_mean_drop
    export_options = ExportOptions(
        forms=forms,
        replace=options.replace,
        captions_per_language=options.captions_per_language,
        retrieval_set=options.retrieval_set,
        calibration=options.calibration,
        calibration_size=options.calibration_size,
        accept_drop=options.max_recall_drop if options.max_recall_drop > own else None,
        threads=options.threads,
    )
    require_free(Path(repository), name, export_options)
    towers = towers_from_checkpoint(checkpoint, base=base)
    towers = dataclasses.replace(towers, source={"checkpoint": Path(str(checkpoint)).name, **towers.source})
    with tempfile.TemporaryDirectory(prefix="babeltower-") as folder:
        study = study_of_towers(towers, name, Path(folder), options, progress)
        report = study.report(progress)
    stem = options.report or Path(repository) / f"{name}.{forms[0].key}.sensitivity"
    files = write_report(report, stem)
    chosen = accepted_trial(report, options, files[1])
    recipes = {m: study.recipe(m, chosen) for m in Modality}
    export = repository_from_towers(
        towers,
        repository,
        name=name,
        options=dataclasses.replace(export_options, recipes=recipes, reference=study.reference),
        progress=progress,
    )
    return Quantised(export, report, files)


def accepted_trial(report: SensitivityReport, options: QuantiseOptions, table: Path) -> Trial:
    """The chosen trial, if it is one to publish.

    Raises:
        ParityError: none met the limits, or too little would be INT8; says what broke with all in INT8.
    """
    whole, chosen = report.trials[0], report.chosen
    if chosen is not None and chosen.share_int8 >= options.min_share_int8:
        return chosen
    found = (
        "no product could be quantised within the limit"
        if chosen is None
        else f"{len(chosen.kept)} of {len(report.costs)} products would have to stay FP32, which leaves "
        f"{chosen.share_int8:.1%} of a tower's operations in INT8, under {options.min_share_int8:.0%}"
    )
    raise ParityError(
        f"{report.model} was not published in INT8 on {report.engine}: {found}. All of it in INT8: "
        f"{' '.join(whole.failures[:4])} ({len(whole.failures)} limits broken.) Calibrate on data like that "
        f"which is served, or allow a larger drop. See {table}."
    )


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What the towers are tried with."""

    name: str
    options: QuantiseOptions
    sources: Mapping[Modality, Path]
    calibration: CalibrationSet
    probe: CalibrationSet
    reference: GateReference
    trials: Trials

    def report(self, progress: Progress) -> SensitivityReport:
        """Charge every product, choose, and try what the plot shows."""
        costs = self._costs(progress)
        ranked = [cost.product for cost in costs]
        progress("trials", 0, len(_PLOTTED) + 2)

        def trial(kept: Sequence[Product]) -> Trial:
            found = self.trials.trial(kept)
            n = len(self.trials.done)
            progress("trials", n, max(n, len(_PLOTTED) + 2))
            return found

        chosen = fewest_kept(ranked, trial)
        for n in (*_PLOTTED, len(ranked) // 2, len(ranked)):
            trial(ranked[:n])
        return SensitivityReport(
            model=self.name,
            engine=self.options.engine.value,
            costs=costs,
            trials=tuple(sorted(self.trials.done, key=lambda t: len(t.kept))),
            chosen=chosen,
            setting=self._setting(),
        )

    def recipe(self, modality: Modality, chosen: Trial) -> Int8Recipe:
        """A tower's recipe, with what the trial kept."""
        kept = tuple(product.name for product in chosen.kept if product.modality is modality)
        return dataclasses.replace(self.options.recipe_to_use, kept=kept)

    def _costs(self, progress: Progress) -> tuple[ProductCost, ...]:
        probe = probe_from_graphs(self.sources, self.probe)
        found: list[ProductCost] = []
        for modality in Modality:
            found += costs_of_products(
                self.sources[modality],
                modality,
                probe=probe,
                calibration=self.calibration.batches(modality),
                recipe=self.options.recipe_to_use,
                progress=progress,
            )
        return tuple(sorted(found, key=lambda cost: (-cost.turned, cost.product)))

    def _setting(self) -> dict[str, Any]:
        recipe, dataset = self.options.recipe_to_use, self.reference.dataset
        return {
            "max_recall_drop": self.options.max_recall_drop,
            "clipping": recipe.method.value,
            "percentile": recipe.percentile,
            "smoothing": recipe.smooth,
            "token_table": recipe.table.value,
            "retrieval_set": dataset.name,
            "n_languages": len(dataset.codes),
            "n_texts": len(self.reference.index.texts),
            "n_images": len(dataset.images),
            "sampled": self.reference.sampled,
            "calibration": self.calibration.as_json(),
            "probe": self.probe.as_json(),
        }


def study_of_towers(
    towers: Towers, name: str, folder: Path, options: QuantiseOptions, progress: Progress
) -> Study:
    """Graphs, calibration, probe and PyTorch's vectors of the retrieval set."""
    sources = {}
    for modality in Modality:
        sources[modality] = folder / modality.value / "model.onnx"
        sources[modality].parent.mkdir()
        onnx_from_tower(
            towers,
            modality,
            sources[modality],
            data_name="model.data",
            metadata=tower_metadata(towers, name, modality),
        )
    (folder / TOKENIZER_FILE).write_text(towers.tokenizer_json, encoding="utf-8")
    tokenizer = Tokenizer(folder / TOKENIZER_FILE, towers.text_preprocessing)

    def drawn(size: CalibrationSize) -> CalibrationSet:
        return calibration_from_path(
            options.calibration,
            tokenizer,
            towers.text_preprocessing,
            towers.image_preprocessing,
            languages=towers.languages,
            size=size,
        )

    calibration = drawn(options.calibration_size)
    probe = drawn(dataclasses.replace(_PROBE, seed=options.calibration_size.seed + 1))
    reference = gate_reference(
        towers,
        options.retrieval_set or sample_retrieval_set(),
        captions_per_language=options.captions_per_language,
        progress=progress,
    )
    inputs = inputs_of_reference(
        reference, tokenizer, towers.image_preprocessing, pad_id=towers.text_preprocessing.pad_id
    )
    trials = Trials(
        sources, calibration, options.recipe_to_use, options.engine, reference, inputs, options.limits
    )
    return Study(name, options, sources, calibration, probe, reference, trials)
