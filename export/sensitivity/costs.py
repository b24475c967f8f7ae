"""INT8 cost per matrix product, each quantized alone in an otherwise FP32 tower.

The cost is thus due to that product's error only. It is measured as the share of nearest neighbours that
change, and needs no captions, so that a user's own calibration data suffices: probe texts retrieve probe
images and vice versa, the FP32 towers' nearest neighbour counts as correct, and its margin over the next best
is compared with the change of margins caused by quantizing the product.

Actual changes would be too few to count. The expected number is used instead, assuming that margins change by
normal noise of the observed size: a smooth measure, and positive whenever vectors change.
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
from export.precision.int8 import Int8Recipe, MeasuredInputs, int8_from_onnx
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
    """Matrix product of one tower, by node name."""

    modality: Modality
    name: str


@dataclass(frozen=True, slots=True)
class ProductCost:
    """Cost of one product in INT8, with all others in FP32.

    Attributes:
        share: Share of its tower's multiply–adds.
        turned: Expected share of the probe's nearest neighbours that change, mean of both directions.
        cosine: Mean cosine with the FP32 tower's vectors over the probe; a zero or NaN vector counts as 0.
    """

    product: Product
    share: float
    turned: float
    cosine: float


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Inputs of both towers, and the FP32 towers' vectors, float32 (rows, dim)."""

    inputs: CalibrationSet
    vectors: Mapping[Modality, Float]

    def turned_by(self, modality: Modality, vectors: Float) -> float:
        """Return the expected share of nearest neighbours that change with these vectors of a tower."""
        other = self.vectors[Modality.IMAGE if modality is Modality.TEXT else Modality.TEXT]
        own = self.vectors[modality]
        return (
            expected_turns((own, vectors), (other, other)) + expected_turns((other, other), (own, vectors))
        ) / 2


def probe_from_graphs(sources: Mapping[Modality, Path], inputs: CalibrationSet) -> Probe:
    """Embed the probe with the FP32 graphs.

    Raises:
        DatasetError: there are fewer than two texts or images, so that no neighbours can be compared.
    """
    vectors = {m: _vectors(sources[m], inputs.batches(m), Precision.FP32) for m in Modality}
    for modality, found in vectors.items():
        if len(found) < 2:
            raise DatasetError(
                f"{inputs.source} has only one {modality.value}, but comparing neighbours needs at least two."
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
    """Measure the cost of every matrix product of a tower, in graph order.

    Args:
        source: The tower's FP32 graph.
        recipe: Quantization recipe; its kept products and its token table are ignored.

    Raises:
        ExportError: an activation is not finite.
    """
    recipe = dataclasses.replace(recipe, kept=(), table=EmbeddingTable.FP32)
    operations = {str(node.name): n for node, n in operations_by_product(onnx_ir.load(source)).items()}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"

        def quantize(kept: tuple[str, ...], measured: MeasuredInputs | None) -> Any:
            return int8_from_onnx(
                source,
                graph,
                data_name="model.data",
                calibration=calibration,
                recipe=dataclasses.replace(recipe, kept=kept),
                measured=measured,
            )

        measured = quantize((), None).measured
        for done, name in enumerate(operations):
            progress(f"{modality.value} products", done, len(operations))
            quantize(tuple(other for other in operations if other != name), measured)
            vectors = _vectors(graph, probe.inputs.batches(modality), Precision.INT8)
            # Non-finite vectors are not an error here: they mark the most expensive products.
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
    """Compute the expected share of queries whose nearest item changes.

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
    # P(margin + noise < 0) of normal noise with this standard deviation
    return float(np.mean([math.erfc(margin / noise / math.sqrt(2)) / 2 for margin in margins.tolist()]))


def _margins(scores: Float, nearest: NDArray[np.int64]) -> Float:
    """Return each query's margin of the given item over the best other item; negative if it trails."""
    rows = np.arange(len(scores))
    own = scores[rows, nearest]
    others = scores.copy()
    others[rows, nearest] = -np.inf
    margins: Float = own - others.max(axis=1)
    return margins


def _vectors(graph: Path, batches: Batches, precision: Precision) -> Float:
    """Embed all batches with ONNX Runtime, the fastest to open; engines agree up to rounding."""
    backend = open_backend(Engine.ONNXRUNTIME, graph, precision=precision, threads=1)
    try:
        return np.concatenate([backend.run(batch, ["vector"])[0] for batch in batches])
    finally:
        backend.close()
