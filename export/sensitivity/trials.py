"""INT8 trials with some products kept in FP32, and the search for the fewest to keep."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.parity.gate import GateReference
from export.precision.calibration import CalibrationSet
from export.precision.int8 import Int8Recipe, MeasuredInputs, int8_from_onnx
from export.retrieval.comparison import Direction, compare_language
from export.retrieval.metrics import RetrievalProtocol, agreement
from export.retrieval.vectors import Vectors
from export.retrieval.verdict import RetrievalLimits, retrieval_failures
from export.sensitivity.costs import Product
from runtime.backends import open_backend
from runtime.manifest import Engine, ImagePreprocessing, Modality, Precision, TextPreprocessing
from runtime.preprocessing.batching import batches_from_rows, inputs_of_batch
from runtime.preprocessing.image import decode, pixels_from_image
from runtime.preprocessing.text import Text, Tokenizer

__all__ = ["Inputs", "Trial", "Trials", "embedded", "fewest_kept", "inputs_of_reference"]

Float = NDArray[np.float32]

_BATCH_TOKENS, _BATCH_IMAGES = 1_024, 32
_MAX_PRUNED = 8

Placed = tuple[NDArray[np.int64], Mapping[str, NDArray[Any]]]
"""Row indices of a batch in the set, and the batch."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Result of keeping some products in FP32.

    Attributes:
        share_int8: Share of the multiply–adds in INT8, of the tower with the smaller share.
        mean_drop: Drop of recall at 1 against PyTorch as a share, mean over the languages, worse direction.
        worst_drop: Largest drop of any language, that of ``worst_language``.
        pairs_per_core_second: Text–image pairs of the retrieval set embedded per second on one thread.
        failures: Limit violations, as sentences.
    """

    kept: tuple[Product, ...]
    share_int8: float
    mean_drop: float
    worst_drop: float
    worst_language: str
    pairs_per_core_second: float
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Retrieval set as input batches of the towers' graphs, with the row indices of each batch."""

    batches: Mapping[Modality, Sequence[Placed]]


def inputs_of_reference(
    reference: GateReference,
    tokenizer: Tokenizer,
    image: ImagePreprocessing,
    preprocessing: TextPreprocessing,
) -> Inputs:
    """Tokenize and decode the retrieval set once for all trials."""
    index = reference.index
    texts = [Text(t, i, code) for i, (t, code) in enumerate(zip(index.texts, index.languages, strict=True))]
    rows = [row.ids for row in tokenizer.rows_from_texts(texts)]
    text = [
        (batch.positions, inputs_of_batch(batch, preprocessing.graph_inputs))
        for batch in batches_from_rows(rows, pad_id=preprocessing.pad_id, max_batch_tokens=_BATCH_TOKENS)
    ]
    sources = reference.dataset.images
    images = [
        (
            np.arange(start, min(start + _BATCH_IMAGES, len(sources))),
            {
                "pixels": np.stack(
                    [
                        pixels_from_image(decode(s.read()), image)
                        for s in sources[start : start + _BATCH_IMAGES]
                    ]
                )
            },
        )
        for start in range(0, len(sources), _BATCH_IMAGES)
    ]
    return Inputs({Modality.TEXT: text, Modality.IMAGE: images})


def embedded(graph: Path, batches: Sequence[Placed], *, engine: Engine) -> tuple[Float, float]:
    """Embed batches on one thread; return the vectors in the set's order, and the CPU seconds."""
    backend = open_backend(engine, graph, precision=Precision.INT8, threads=1)
    try:
        width = backend.run(batches[-1][1], ["vector"])[0].shape[1]
        vectors = np.empty((sum(len(places) for places, _ in batches), width), np.float32)
        started = time.process_time()
        for places, batch in batches:
            vectors[places] = backend.run(batch, ["vector"])[0]
        return vectors, time.process_time() - started
    finally:
        backend.close()


@dataclass(slots=True)
class Trials:
    """Trials of one checkpoint on one engine, with cached tower runs.

    Attributes:
        sources: FP32 graphs.
        reference: PyTorch's vectors of the retrieval set.
        recipe: Recipe for the products that are not kept in FP32.
        limits: Retrieval limits; the mean over the languages must hold without the allowance for sampling.
    """

    sources: Mapping[Modality, Path]
    calibration: CalibrationSet
    recipe: Int8Recipe
    engine: Engine
    reference: GateReference
    inputs: Inputs
    limits: RetrievalLimits
    done: list[Trial] = field(default_factory=list)
    _towers: dict[tuple[Modality, frozenset[str]], _TowerRun] = field(default_factory=dict)
    _measurements: dict[Modality, MeasuredInputs] = field(default_factory=dict)

    def trial(self, kept: Sequence[Product]) -> Trial:
        """Quantize, embed the retrieval set and compare with PyTorch; results are cached in ``done``."""
        found = next((trial for trial in self.done if set(trial.kept) == set(kept)), None)
        if found is None:
            found = self._measured(tuple(kept))
            self.done.append(found)
        return found

    def _measured(self, kept: tuple[Product, ...]) -> Trial:
        runs = {m: self._run(m, frozenset(p.name for p in kept if p.modality is m)) for m in Modality}
        reference, dataset = self.reference, self.reference.dataset
        found = Vectors(runs[Modality.IMAGE].vectors, runs[Modality.TEXT].vectors, reference.index)
        languages = [
            compare_language(dataset, captions, reference.vectors, found, RetrievalProtocol.ANY)
            for captions in dataset.captions
        ]
        images = agreement(reference.vectors.images, found.images)
        mean_drops = {
            d: float(np.mean([figures.comparison(d).drop(1) for figures in languages])) for d in Direction
        }
        drops = {f.code: max(f.comparison(d).drop(1) for d in Direction) for f in languages}
        worst = max(drops, key=lambda code: drops[code])
        failures = [
            f"mean over {len(languages)} languages, {d.value}: R@1 drops by {drop:.4f}; "
            f"the limit is {self.limits.max_mean_drop}."
            for d, drop in mean_drops.items()
            if drop > self.limits.max_mean_drop
        ]
        return Trial(
            kept=kept,
            share_int8=min(run.share_int8 for run in runs.values()),
            mean_drop=max(mean_drops.values()),
            worst_drop=drops[worst],
            worst_language=worst,
            pairs_per_core_second=1 / sum(run.cpu_seconds_a_row for run in runs.values()),
            failures=(*failures, *retrieval_failures(languages, images, self.limits)),
        )

    def _run(self, modality: Modality, kept: frozenset[str]) -> _TowerRun:
        key = (modality, kept)
        if key not in self._towers:
            with tempfile.TemporaryDirectory() as folder:
                graph = Path(folder) / "model.onnx"
                report = int8_from_onnx(
                    self.sources[modality],
                    graph,
                    data_name="model.data",
                    calibration=self.calibration.batches(modality),
                    recipe=dataclasses.replace(self.recipe, kept=tuple(sorted(kept))),
                    measured=self._measurements.get(modality),
                )
                if not kept:
                    self._measurements[modality] = report.measured
                vectors, seconds = embedded(graph, self.inputs.batches[modality], engine=self.engine)
            self._towers[key] = _TowerRun(vectors, report.share_int8, seconds / len(vectors))
        return self._towers[key]


@dataclass(frozen=True, slots=True, eq=False)
class _TowerRun:
    vectors: Float
    share_int8: float
    cpu_seconds_a_row: float


def fewest_kept(ranked: Sequence[Product], trial: Callable[[Sequence[Product]], Trial]) -> Trial | None:
    """Search for the fewest products to keep in FP32 such that the limits hold.

    The number of costliest products to keep is doubled until the limits hold, then bisected. Up to eight kept
    products, the cheapest first, are then removed where the limits still hold.

    Args:
        ranked: All products, the costliest first.

    Returns:
        The trial that passed; None if the limits do not hold even with all products in FP32.
    """
    if not trial(()).failures:
        return trial(())
    too_few, enough = 0, 1
    while trial(ranked[:enough]).failures:
        if enough >= len(ranked):
            return None
        too_few, enough = enough, min(2 * enough, len(ranked))
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if trial(ranked[:middle]).failures:
            too_few = middle
        else:
            enough = middle
    kept = list(ranked[:enough])
    for product in ranked[: enough - 1][::-1][:_MAX_PRUNED]:
        fewer = [other for other in kept if other != product]
        if not trial(fewer).failures:
            kept = fewer
    return trial(kept)
