"""Publish a checkpoint in INT8, keeping the fewest products in FP32 that meet a recall limit."""

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
from export.parity.limits import limits_of
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
    "QuantizeOptions",
    "QuantizedModel",
    "Study",
    "accepted_trial",
    "quantized_from_checkpoint",
    "recipe_from_options",
    "study_of_towers",
]

_PROBE = CalibrationSize(n_texts=1_024, n_images=256)
_PLOTTED = (0, 1, 2, 4, 8)


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Ignore progress reports."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Settings of the sensitivity study and the INT8 export.

    Attributes:
        engine: Engine to quantize for.
        max_recall_drop: Maximum drop of recall at 1 as a share, mean over the languages, in either direction.
            An excess over the precision's own limit is recorded in the manifest as accepted.
        min_share_int8: Minimum share of each tower's multiply–adds in INT8; refuse to publish with less.
        recipe: Clipping, smoothing and token table; the engine's default if None. Its kept products are
            ignored.
        calibration: Parquet file or image folder; the samples' training split if None.
        captions_per_language: Captions per language that recall is measured on; None for all.
        report: Path of the tables and the plot, without suffix; beside the model if None.
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
        _require_studied(self.engine)
        if not 0 < self.max_recall_drop < 1:
            raise ExportError(
                f"max_recall_drop {self.max_recall_drop} is out of range; expected a share, 0 to 1."
            )

    @property
    def recipe_to_use(self) -> Int8Recipe:
        """Recipe for the engine, with no kept products."""
        target = GraphTarget(self.engine.value)
        return dataclasses.replace(self.recipe or recipe_for(target), target=target, kept=())

    @property
    def limits(self) -> RetrievalLimits:
        """Retrieval limits of the trials: the precision's own, with the given limit on the mean."""
        own = limits_of(Precision.INT8, self.engine).retrieval
        return dataclasses.replace(
            own,
            max_mean_drop=self.max_recall_drop,
            max_recall_drop=max(own.max_recall_drop, self.max_recall_drop),
            max_later_recall_drop=max(own.max_later_recall_drop, self.max_recall_drop),
            sampled=self.captions_per_language is not None,
        )


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """Published export, its sensitivity report, and the report's files."""

    export: Export
    report: SensitivityReport
    files: tuple[Path, ...]


def _require_studied(engine: Engine) -> None:
    if engine not in GRAPH_ENGINES:
        raise ExportError(
            f"The sensitivity study does not support {engine.value}, which runs only on a GPU; expected one "
            f"of {[known.value for known in GRAPH_ENGINES]}."
        )


def recipe_from_options(
    engine: Engine, *, method: str | None, percentile: float | None, smooth: float | None
) -> Int8Recipe:
    """Return an engine's default recipe with the given options applied.

    Raises:
        ExportError: the method does not exist, or a value is out of range.
    """
    _require_studied(engine)
    recipe = recipe_for(GraphTarget(engine.value))
    if method is not None:
        if method not in [known.value for known in ClipMethod]:
            raise ExportError(
                f"Unknown clipping method {method!r}; expected one of {[m.value for m in ClipMethod]}."
            )
        recipe = dataclasses.replace(recipe, method=ClipMethod(method))
    if percentile is not None:
        if recipe.method is not ClipMethod.PERCENTILE:
            raise ExportError(
                f"--percentile has no effect with method {recipe.method.value}; pass --method percentile."
            )
        recipe = dataclasses.replace(recipe, percentile=percentile)
    return recipe if smooth is None else dataclasses.replace(recipe, smooth=smooth)


def quantized_from_checkpoint(
    checkpoint: str | Path,
    repository: str | Path,
    options: QuantizeOptions,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    image_tower: str | Path | None = None,
    progress: Progress = _silent,
) -> QuantizedModel:
    """Publish REPOSITORY/NAME in INT8 for one engine, with the fewest products in FP32 that meet the limit.

    Args:
        checkpoint: Folder, ``.ckpt`` file or hub name.
        name: Name of the model; the checkpoint's name by default.
        base: Base checkpoint of a LoRA adapter.
        image_tower: See ``towers_from_checkpoint``.

    Raises:
        ParityError: no selection meets the limit, or the parity gate refuses the variant; the tables are
            still written.
        BabeltowerError: any error of reading the checkpoint or the calibration data, or of the export.
    """
    name = name or name_of_checkpoint(checkpoint)
    forms = forms_for([Precision.INT8], [options.engine], installed=installed_engines())
    own = limits_of(Precision.INT8, options.engine).retrieval.max_mean_drop
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
    towers = towers_from_checkpoint(checkpoint, base=base, image_tower=image_tower)
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
    return QuantizedModel(export, report, files)


def accepted_trial(report: SensitivityReport, options: QuantizeOptions, table: Path) -> Trial:
    """Return the chosen trial if it can be published.

    Raises:
        ParityError: no trial met the limits, or too little would be INT8; the message gives the violations
            with all products in INT8.
    """
    whole, chosen = report.trials[0], report.chosen
    if chosen is not None and chosen.share_int8 >= options.min_share_int8:
        return chosen
    found = (
        "no product could be quantized within the limit"
        if chosen is None
        else f"{len(chosen.kept)} of {len(report.costs)} products would have to stay FP32, which leaves "
        f"{chosen.share_int8:.1%} of a tower's operations in INT8, below {options.min_share_int8:.0%}"
    )
    raise ParityError(
        f"{report.model} was not published in INT8 on {report.engine}: {found}. With all products in INT8: "
        f"{' '.join(whole.failures[:4])} ({len(whole.failures)} limits violated.) Calibrate on data similar "
        f"to that in production, or allow a larger drop. See {table}."
    )


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """Sensitivity study of one model: graphs, data and trials."""

    name: str
    options: QuantizeOptions
    sources: Mapping[Modality, Path]
    calibration: CalibrationSet
    probe: CalibrationSet
    reference: GateReference
    trials: Trials

    def report(self, progress: Progress) -> SensitivityReport:
        """Measure all products' costs, choose the kept ones, and run the trials of the plot."""
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
        """Return a tower's recipe with the trial's kept products."""
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
    towers: Towers, name: str, folder: Path, options: QuantizeOptions, progress: Progress
) -> Study:
    """Prepare a study: export graphs, draw calibration and probe data, embed the retrieval set in PyTorch."""
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
    inputs = inputs_of_reference(reference, tokenizer, towers.image_preprocessing, towers.text_preprocessing)
    trials = Trials(
        sources, calibration, options.recipe_to_use, options.engine, reference, inputs, options.limits
    )
    return Study(name, options, sources, calibration, probe, reference, trials)
