"""Graph pass for servers that pad every text to the context length and pass no mask.

The mask is found from the padding id, and the columns behind the longest text are cut before the tower sees
them: a text of five tokens costs five tokens, not 77. A tower with language tokens also gets a default
language here, for texts that come without one, and second ids of its language tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.edits import add_weight

__all__ = ["LanguageTokens", "take_padded_texts"]

_INT64, _INT32, _BOOL = onnx_ir.DataType.INT64, onnx_ir.DataType.INT32, onnx_ir.DataType.BOOL


@dataclass(frozen=True, slots=True)
class LanguageTokens:
    """Language tokens of a tower, one of which begins every text.

    Attributes:
        default: Token to put before texts that begin with none.
        known: All tokens.
        second_ids: Token by each further id that a tokenizer gives it; these are in no tower's table.
    """

    default: int
    known: Sequence[int]
    second_ids: Mapping[int, int] = field(default_factory=dict)


def take_padded_texts(
    model: onnx_ir.Model,
    *,
    name: str,
    pad_id: int,
    context_length: int,
    languages: LanguageTokens | None = None,
) -> None:
    """Replace ``input_ids`` and ``attention_mask``, in place, with one input of padded token ids.

    Args:
        name: Name of the new input, int32 (batch, context length).
        pad_id: Token behind a text's end. One inside a text is part of it, as in a tokenizer's mask.
        languages: For a tower with language tokens. A text that fills the context without one loses its last
            token before the end token, as if it had been tokenized with the default language.
    """
    graph = model.graph
    ids, mask = (next(v for v in graph.inputs if v.name == own) for own in ("input_ids", "attention_mask"))
    assert ids.shape is not None
    text = onnx_ir.Value(
        name=name,
        type=onnx_ir.TensorType(_INT32),
        shape=onnx_ir.Shape([ids.shape[0], context_length]),
    )
    made = _Prologue(graph, ids.shape[0])
    rows = made.add("Cast", [text], [context_length], to=_INT64.value)
    if languages is not None:
        rows = _with_first_ids(made, rows, languages, context_length)
        rows = _with_language(made, rows, languages, pad_id, context_length)
    lengths = _lengths(made, rows, pad_id, context_length)
    longest = made.add("ReduceMax", [lengths], None, keepdims=0)
    end = made.add("Reshape", [longest, made.ints([1])], None)
    before_end = made.add("Less", [made.ints([range(context_length)]), lengths], [context_length], _BOOL)
    whole_mask = made.add("Cast", [before_end], [context_length], to=_INT64.value)
    sequence = ids.shape[1]
    for old, padded in ((ids, rows), (mask, whole_mask)):
        cut = made.add("Slice", [padded, made.ints([0]), end, made.ints([1])], [sequence])
        old.replace_all_uses_with(cut)
    graph.insert_before(graph[0], made.nodes)
    graph.inputs[:] = [text]


def _with_first_ids(
    made: _Prologue, rows: onnx_ir.Value, languages: LanguageTokens, context_length: int
) -> onnx_ir.Value:
    """Replace second ids of language tokens by the ids of the tower's table."""
    for second, first in languages.second_ids.items():
        found = made.add("Equal", [rows, made.ints([[second]])], [context_length], _BOOL)
        rows = made.add("Where", [found, made.ints([[first]]), rows], [context_length])
    return rows


def _with_language(
    made: _Prologue, rows: onnx_ir.Value, languages: LanguageTokens, pad_id: int, context_length: int
) -> onnx_ir.Value:
    """Shift rows without a language token by one, and put the default language first."""
    last = context_length - 1
    first = made.columns(rows, 0, 1)
    known = made.add("Equal", [first, made.ints([languages.known])], [len(languages.known)], _BOOL)
    known_int = made.add("Cast", [known], [len(languages.known)], to=_INT64.value)
    any_known = made.add("ReduceMax", [known_int, made.ints([1])], [1], keepdims=1)
    spoken = made.add("Cast", [any_known], [1], _BOOL, to=_BOOL.value)
    nothing = made.add("Mul", [first, made.ints([[0]])], [1])
    default = made.add("Add", [nothing, made.ints([[languages.default]])], [1])
    # a full row keeps its end token, and loses the token before it
    end, before = made.columns(rows, last, last + 1), made.columns(rows, last - 1, last)
    is_short = made.add("Equal", [end, made.ints([[pad_id]])], [1], _BOOL)
    tail = made.add("Where", [is_short, before, end], [1])
    body = made.columns(rows, 0, last - 1)
    shifted = made.add("Concat", [default, body, tail], [context_length], axis=1)
    return made.add("Where", [spoken, rows, shifted], [context_length])


def _lengths(made: _Prologue, rows: onnx_ir.Value, pad_id: int, context_length: int) -> onnx_ir.Value:
    """Number of tokens up to each text's last that is not padding, at least one: (batch, 1)."""
    is_pad = made.add("Equal", [rows, made.ints([[pad_id]])], [context_length], _BOOL)
    is_token = made.add("Not", [is_pad], [context_length], _BOOL)
    ones = made.add("Cast", [is_token], [context_length], to=_INT64.value)
    ends = made.add("Mul", [ones, made.ints([range(1, context_length + 1)])], [context_length])
    lengths = made.add("ReduceMax", [ends, made.ints([1])], [1], keepdims=1)
    return made.add("Max", [lengths, made.ints([[1]])], [1])


@dataclass(slots=True)
class _Prologue:
    """Integer nodes to put before a graph's first."""

    graph: onnx_ir.Graph
    batch: Any
    nodes: list[onnx_ir.Node] = field(default_factory=list)

    def add(
        self,
        op_type: str,
        inputs: Sequence[onnx_ir.Value],
        columns: Sequence[Any] | None,
        dtype: onnx_ir.DataType = _INT64,
        **attributes: int,
    ) -> onnx_ir.Value:
        """Add a node; its output is (batch, columns), or of unknown shape where ``columns`` is None."""
        name = f"padded_texts/{op_type}_{len(self.nodes)}"
        node = onnx_ir.node(op_type, inputs, attributes, name=name)
        output = node.outputs[0]
        output.name, output.dtype = f"{name}_out", dtype
        output.shape = None if columns is None else onnx_ir.Shape([self.batch, *columns])
        self.nodes.append(node)
        return output

    def ints(self, values: Any) -> onnx_ir.Value:
        """An int64 constant."""
        array: NDArray[np.int64] = np.array(
            [list(row) if not isinstance(row, int) else row for row in values], np.int64
        )
        return add_weight(self.graph, "padded_texts/constant", array)

    def columns(self, rows: onnx_ir.Value, start: int, end: int) -> onnx_ir.Value:
        """Columns ``start`` to ``end`` of rows."""
        bounds = [self.ints([start]), self.ints([end]), self.ints([1])]
        return self.add("Slice", [rows, *bounds], [end - start])
