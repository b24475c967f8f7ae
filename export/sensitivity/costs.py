"""What INT8 costs, product by product: each is quantised alone, in a tower that is FP32 otherwise.

A product is then charged with its own error and no other's. The charge is in retrieval's own currency, how
many nearest neighbours turn, and needs no captions, so that a user's own calibration data will do: probe
texts look for probe images and images for texts, the FP32 towers' answer counts as the right one, and its
margin over the next best is compared with how far quantising the product moves margins.

Single hits that turn would be too few to count. What is counted is their expectation, if margins move by
normal noise of the size that was seen: smooth, and never nothing where vectors moved.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.embedding_table import EmbeddingTable
from export.graphs.matrix_products import operations_by_product
from export.precision.calibration import CalibrationSet
from export.precision.int8 import Int8Recipe, Measured, int8_from_onnx
from export.retrieval.vectors import Progress
from runtime.backends import open_backend
from runtime.cosines import row_cosines
from runtime.errors import DatasetError
from runtime.manifest import Engine, Modality, Precision

__all__ = ["Probe", "Product", "ProductCost", "costs_of_products", "expected_turns", "probe_from_graphs"]

Float = NDArray[np.float32]
Batches = Sequence[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True, order=True)
class Product:
    """A matrix product of one of the towers, by its node's name."""

    modality: Modality
    name: str


@dataclass(frozen=True, slots=True)
class ProductCost:
    """One product in INT8, all else in FP32.

    Attributes:
        share: Of its tower's multiply–adds.
        turned: Expected share of the probe's nearest neighbours that change, mean of both directions.
        cosine: Mean over the probe, with the FP32 tower's vectors; a zero or NaN vector counts as 0.
    """

    product: Product
    share: float
    turned: float
    cosine: float


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Inputs of both towers, and what the FP32 towers make of them: float32 (rows, dim)."""

    inputs: CalibrationSet
    vectors: Mapping[Modality, Float]

    def turned_by(self, modality: Modality, vectors: Float) -> float:
        """Expected share of nearest neighbours that turn when a tower gives these vectors instead."""
        other = self.vectors[Modality.IMAGE if modality is Modality.TEXT else Modality.TEXT]
        own = self.vectors[modality]
        return (
            expected_turns((own, vectors), (other, other)) + expected_turns((other, other), (own, vectors))
        ) / 2


def probe_from_graphs(sources: Mapping[Modality, Path], inputs: CalibrationSet) -> Probe:
    """Embed the probe with the FP32 graphs.

    Raises:
        DatasetError: the inputs hold fewer than two texts or images: nothing is nearer than another.
    """
    vectors = {m: _vectors(sources[m], inputs.batches(m), Precision.FP32) for m in Modality}
    for modality, found in vectors.items():
        if len(found) < 2:
            raise DatasetError(
                f"{inputs.source} has one {modality.value} alone: none is nearer than another. Give more."
            )
    return Probe(inputs, vectors)


def costs_of_products(
    source: Path,
    modality: Modality,
    *,
    probe: Probe,
    calibration: Batches,
    recipe: Int8Recipe,
    progress: Progress = lambda _stage, _done, _total: None,
) -> tuple[ProductCost, ...]:
    """Charge every matrix product of a tower, in the graph's order.

    Args:
        source: The tower's FP32 graph.
        recipe: How each product is quantised; what it keeps, and its token table, make no difference.

    Raises:
        ExportError: an activation is not finite.
    """
    recipe = dataclasses.replace(recipe, kept=(), table=EmbeddingTable.FP32)
    operations = {str(node.name): n for node, n in operations_by_product(onnx_ir.load(source)).items()}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"

        def quantise(kept: tuple[str, ...], measured: Measured | None) -> Any:
            return int8_from_onnx(
                source,
                graph,
                data_name="model.data",
                calibration=calibration,
                recipe=dataclasses.replace(recipe, kept=kept),
                measured=measured,
            )

        measured = quantise((), None).measured
        for done, name in enumerate(operations):
            progress(f"{modality.value} products", done, len(operations))
            quantise(tuple(other for other in operations if other != name), measured)
            vectors = _vectors(graph, probe.inputs.batches(modality), Precision.INT8)
            # A product that leaves no vector is what is looked for here: the most expensive, not an error.
            vectors = np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, np.float32(0))
            cosines = row_cosines(vectors, probe.vectors[modality])
            found.append(
                ProductCost(
                    product=Product(modality, name),
                    share=operations[name] / sum(operations.values()),
                    turned=probe.turned_by(modality, vectors),
                    cosine=float(np.nan_to_num(cosines, nan=0.0).mean()),
                )
            )
        progress(f"{modality.value} products", len(operations), len(operations))
    return tuple(found)


def expected_turns(queries: tuple[Float, Float], items: tuple[Float, Float]) -> float:
    """Expected share of queries whose nearest item is another one afterwards.

    Args:
        queries: float32 (queries, dim), before and after.
        items: float32 (items, dim), before and after; at least two.
    """
    before = queries[0] @ items[0].T
    nearest = before.argmax(axis=1)
    margins = _margins(before, nearest)
    moved = _margins(queries[1] @ items[1].T, nearest) - margins
    noise = math.sqrt(float(np.square(moved, dtype=np.float64).mean()))
    if noise == 0:
        return 0.0
    return float(np.mean([math.erfc(margin / noise / math.sqrt(2)) / 2 for margin in margins.tolist()]))


def _margins(scores: Float, nearest: NDArray[np.int64]) -> Float:
    """By how much each query's given item leads the best of the others; negative where it does not."""
    rows = np.arange(len(scores))
    own = scores[rows, nearest]
    others = scores.copy()
    others[rows, nearest] = -np.inf
    margins: Float = own - others.max(axis=1)
    return margins


def _vectors(graph: Path, batches: Batches, precision: Precision) -> Float:
    """Of all batches. The values are the same in every engine up to rounding; this one is quick to open."""
    backend = open_backend(Engine.ONNXRUNTIME, graph, precision=precision, threads=1)
    try:
        return np.concatenate([backend.run(batch, ["vector"])[0] for batch in batches])
    finally:
        backend.close()
