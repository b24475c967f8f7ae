"""Simulate a 16-bit graph in FP32: every value that the graph holds in FP16 or BF16 is rounded to it.

A processor without 16-bit kernels computes such a graph in FP32 or not at all. The simulation has the
rounding of each node's inputs and outputs, and FP32 sums inside, as on a GPU. Operators of packed texts,
which a processor lacks, are spelled out.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir

from export.graphs.files import save_graph
from export.graphs.float_types import cast_of, weight_as
from export.graphs.spelled_packing import spell_out_packing

__all__ = ["simulated_from_onnx"]

_FLOAT = onnx_ir.DataType.FLOAT
_NARROW = frozenset({onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16})


def simulated_from_onnx(source: Path, target: Path, *, data_name: str) -> int:
    """Write an FP32 graph that rounds where ``source`` stores 16 bits.

    Args:
        source: Graph with typed values, from ``export/precision/fp16.py``.

    Returns:
        Number of rounded values.
    """
    model = onnx_ir.load(source)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if value.dtype in _NARROW and value.const_value is not None:
            wide = weight_as(value.const_value, _FLOAT, f"{name}/wide")
            graph.register_initializer(wide)
            value.replace_all_uses_with(wide)
            del graph.initializers[name]
    n_rounded = 0
    for node in list(graph):
        for output in node.outputs:
            if output.dtype not in _NARROW or not output.name:
                continue
            narrow, uses = output.dtype, list(output.uses())
            output.dtype = _FLOAT
            if node.op_type == "Cast":
                node.attributes["to"] = onnx_ir.AttrInt64("to", _FLOAT.value)
            down = cast_of(output, narrow, f"{output.name}/narrow")
            up = cast_of(down.outputs[0], _FLOAT, f"{output.name}/rounded")
            graph.insert_after(node, [down, up])
            for use in uses:
                use.node.replace_input_with(use.idx, up.outputs[0])
            n_rounded += 1
    spell_out_packing(model)
    model.metadata_props["babeltower.simulated"] = "1"
    save_graph(model, target, data_name=data_name)
    return n_rounded
