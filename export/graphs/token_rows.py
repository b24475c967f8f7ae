"""Graph pass that keeps only some rows of the token table, in any precision."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.edits import constant
from export.graphs.files import save_graph
from runtime.errors import ExportError

__all__ = ["keep_token_rows"]


def keep_token_rows(graph: Path, rows: NDArray[np.int64], *, data_name: str) -> bool:
    """Keep only some rows of every table that a graph's token ids look up, in their order; in place.

    A table may be FP32, FP16, BF16 or int8 with one scale per row; the kept rows are unchanged, so that
    ``rows[i]`` in the old graph and ``i`` in the new one give the same vectors.

    Args:
        graph: ONNX file of a text tower.
        rows: Rows to keep, ascending.
        data_name: Name of its external data file, if it is large.

    Returns:
        False if the tables have only these rows already.

    Raises:
        ExportError: the graph looks up no table by its token ids, or a table lacks a row.
    """
    model = onnx_ir.load(graph)
    tables = dict(_tables(model.graph))
    if not tables:
        raise ExportError(f"{graph} looks up no token table; its vocabulary cannot be pruned.")
    shortest = min(len(stored) for stored in tables.values())
    if shortest == len(rows):
        return False
    if shortest <= int(rows[-1]):
        raise ExportError(f"The token table of {graph} has {shortest} rows, but row {rows[-1]} is kept.")
    for table, stored in tables.items():
        _keep(table, stored[rows])
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        save_graph(model, Path(folder) / graph.name, data_name=data_name)
        (graph.parent / data_name).unlink(missing_ok=True)
        for path in sorted(Path(folder).iterdir()):
            path.replace(graph.parent / path.name)
    return True


def _tables(graph: onnx_ir.Graph) -> Iterator[tuple[onnx_ir.Value, NDArray[Any]]]:
    """Yield the stored tables that are looked up by a graph input, with their values."""
    for node in graph:
        if node.op_type == "Gather" and _is_input(node.inputs[1], graph):
            table = node.inputs[0]
            while table is not None and not table.is_initializer():
                made = table.producer()
                if made is None or made.op_type != "Cast":
                    break
                table = made.inputs[0]
            stored = constant(table)
            if table is None or stored is None:
                raise ExportError(f"The table of {node.name} is computed, and cannot be pruned.")
            yield table, stored


def _is_input(ids: onnx_ir.Value | None, graph: onnx_ir.Graph) -> bool:
    while ids is not None and ids not in graph.inputs:
        made = ids.producer()
        if made is None or made.op_type not in ("Cast", "ScatterElements"):  # packed texts move their ids
            return False
        ids = made.inputs[0]
    return ids is not None


def _keep(table: onnx_ir.Value, kept: NDArray[Any]) -> None:
    table.const_value = onnx_ir.Tensor(kept, dtype=table.dtype, name=table.name)
    table.shape = onnx_ir.Shape(kept.shape)
    for use in table.uses():
        if use.node.op_type == "Cast":
            use.node.outputs[0].shape = table.shape
