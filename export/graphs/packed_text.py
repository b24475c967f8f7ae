"""Graph pass that removes the padding of texts, for towers that mask it.

Between the embeddings and the pool, the tokens of all texts are the rows of one matrix, without padding:

    (batch, sequence, width) → RemovePadding → (tokens, width) → layers → first token, or RestorePadding

``PackedMultiHeadAttention`` keeps the texts apart. These operators of ONNX Runtime exist on CUDA alone, in
FP32 and FP16; they assume that a text's padding lies behind it. So that any mask gives the padded graph's
vectors, the token ids and positions of a row are first moved together, in order, unmasked ones first:
attention reads tokens as a set, once they have their positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from export.graphs.early_pooling import is_by_token, selects_token
from export.graphs.edits import add_weight, constant, drop_unused, producer
from export.graphs.fused_norms import CONTRIB
from export.graphs.square_bias import mask_of_square
from runtime.errors import ExportError

__all__ = ["TOKENS", "pack_text"]

TOKENS = "tokens"
"""Name of the dimension that counts the tokens of all texts."""

_FLOAT, _INT32, _INT64 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT32, onnx_ir.DataType.INT64
_BOOL = onnx_ir.DataType.BOOL
_NAME = "packed"


def pack_text(model: onnx_ir.Model) -> int:
    """Remove the padding between the embeddings and the pool, in place; attentions must be fused.

    Returns:
        Number of packed attentions.

    Raises:
        ExportError: the tower does not mask its padding, or reads what lies behind a text.
    """
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "MultiHeadAttention"]
    masks = {mask_of_square(_input(node, 5)) for node in attentions}
    mask = masks.pop() if len(masks) == 1 else None
    if mask is None:
        raise ExportError(
            f"The texts of {graph.name!r} cannot be packed: its attention does not mask the padding, which is"
            " part of the vectors then, or lies behind the pooled token. Export it without packed text."
        )
    packing = _Packing(graph, mask)
    packing.remove_padding(_embeddings(attentions[0].inputs[0]))
    for node in list(graph):
        if any(value in packing.packed for value in node.inputs if value is not None):
            packing.rewrite(node)
    packing.close()
    graph.sort()
    drop_unused(model)
    return len(attentions)


def _input(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _embeddings(value: onnx_ir.Value | None) -> onnx_ir.Value:
    """Return what enters the first layer: back from its query to a sum of two values, or a lookup."""
    node = producer(value)
    while node is not None and is_by_token(node):
        computed = [part for part in node.inputs if part is not None and constant(part) is None]
        if len(computed) != 1:
            break
        value = computed[0]
        node = value.producer()
    assert value is not None
    return value


class _Packing:
    """Rewrite of one graph; ``packed`` are the values whose rows are tokens."""

    def __init__(self, graph: onnx_ir.Graph, mask: onnx_ir.Value) -> None:
        self.graph, self.mask = graph, mask
        self.packed: set[onnx_ir.Value] = set()
        self._by_token = {node for node in graph if is_by_token(node)}
        self._selections = {node for node in graph if selects_token(node)}
        self._pooling = _uses_outside_attention(mask)
        self._restored: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self._is_guarded = False
        self._move_together()

    def _move_together(self) -> None:
        """Compute each token's place when the unmasked tokens of its row come first, in order."""
        keep = self._add("Cast", [self.mask], _BOOL, self.mask.shape, to=_BOOL.value)
        axis = self._ints("axis", 1)
        one = self._ints("one", 1)
        shape = self.mask.shape
        n_kept = self._add("CumSum", [self.mask, axis], _INT64, shape)
        masked = self._add("Sub", [one, self.mask], _INT64, shape)
        n_masked = self._add("CumSum", [masked, axis], _INT64, shape)
        last = self._add("Gather", [n_kept, self._ints("last", [-1])], _INT64, [self._batch, 1], axis=1)
        behind = self._add("Add", [n_masked, last], _INT64, shape)
        counted = self._add("Where", [keep, n_kept, behind], _INT64, shape)
        self._places = self._add("Sub", [counted, one], _INT64, shape)
        flat = self._add("Squeeze", [last, self._ints("axes", [1])], _INT64, [self._batch])
        self._counts = self._add("Cast", [flat], _INT32, [self._batch], to=_INT32.value)

    def _moved(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """Return an integer value (batch, sequence) with the unmasked tokens of each row first."""
        assert value.dtype is not None
        return self._add("ScatterElements", [value, self._places, value], value.dtype, value.shape, axis=1)

    def remove_padding(self, embedded: onnx_ir.Value) -> None:
        """Move the tokens together where their embeddings are looked up, and pack these."""
        moved: dict[onnx_ir.Value, onnx_ir.Value] = {}
        for lookup in _lookups(embedded):
            ids = lookup.inputs[1]
            assert ids is not None
            if ids not in moved:
                moved[ids] = self._moved(ids)
            lookup.replace_input_with(1, moved[ids])
        for node, index in self._pooling:
            if self.mask not in moved:
                moved[self.mask] = self._moved(self.mask)
            node.replace_input_with(index, moved[self.mask])
        readers = list(embedded.uses())
        assert embedded.shape is not None
        node = onnx_ir.node(
            "RemovePadding",
            [embedded, self._counts],
            domain=CONTRIB,
            num_outputs=4,
            name=f"{_NAME}/RemovePadding",
        )
        tokens, self._offsets, self._ends, longest = node.outputs
        batch, sequence, width = embedded.shape
        _state(tokens, "tokens", _FLOAT, [onnx_ir.SymbolicDim(TOKENS), width])
        _state(self._offsets, "offsets", _INT32, [batch, sequence])
        _state(self._ends, "ends", _INT32, [None])
        _state(longest, "longest", _INT32, [1])
        self.graph.append(node)
        for use in readers:
            use.node.replace_input_with(use.idx, tokens)
        self.packed.add(tokens)

    def rewrite(self, node: onnx_ir.Node) -> None:
        """Make a node that reads packed values compute on these, or give it the padded ones back."""
        computed = [value for value in node.inputs if value is not None and constant(value) is None]
        if node.op_type == "MultiHeadAttention":
            self._pack_attention(node)
        elif node in self._selections:
            self._select_first(node)
        elif self.packed.issuperset(computed):
            (output,) = node.outputs
            if node not in self._by_token or output.is_graph_output() or output.shape is None:
                raise self._refusal(node)
            if node.op_type == "LayerNormalization":
                node.attributes["axis"] = onnx_ir.AttrInt64("axis", -1)
            output.shape = onnx_ir.Shape([onnx_ir.SymbolicDim(TOKENS), output.shape[2]])
            self.packed.add(output)
        else:
            self._restore(node)

    def _pack_attention(self, node: onnx_ir.Node) -> None:
        old = node.outputs[0]
        if not self.packed.issuperset(node.inputs[:3]) or old.shape is None or _input(node, 3) is not None:
            raise self._refusal(node)
        attributes = {
            name: node.attributes[name] for name in ("num_heads", "scale") if name in node.attributes
        }
        made = onnx_ir.node(
            "PackedMultiHeadAttention",
            [*node.inputs[:3], None, self._offsets, self._ends],
            attributes,
            domain=CONTRIB,
            name=str(node.name),
        )
        name, width = str(old.name), old.shape[2]
        old.name = f"{name}/padded"
        output = made.outputs[0]
        output.name, output.dtype = name, _FLOAT
        output.shape = onnx_ir.Shape([onnx_ir.SymbolicDim(TOKENS), width])
        self.graph.insert_before(node, made)
        old.replace_all_uses_with(output)
        self.graph.remove(node, safe=True)
        self.packed.add(output)

    def _select_first(self, node: onnx_ir.Node) -> None:
        """Read the first token of each text; a row whose first token is masked becomes not a number.

        Such a token asks without being asked, which packed attention cannot express. No tokenizer masks it.
        """
        place = constant(node.inputs[1])
        if place is None or int(place) != 0:
            raise self._refusal(node)
        first = self._starts()
        node.replace_input_with(1, first)
        node.attributes["axis"] = onnx_ir.AttrInt64("axis", 0)
        if not self._is_guarded:
            self._is_guarded = True
            self._guard(node)

    def _starts(self) -> onnx_ir.Value:
        if not hasattr(self, "_first"):
            bounds = [self._ints(name, [at]) for name, at in (("begin", 0), ("before_last", -1))]
            self._first = self._add("Slice", [self._ends, *bounds], _INT32, [self._batch])
        return self._first

    def _guard(self, node: onnx_ir.Node) -> None:
        """Add 0 / mask of the first token to what is selected."""
        output = node.outputs[0]
        column = self._add("Gather", [self.mask, self._ints("first", [0])], _INT64, [self._batch, 1], axis=1)
        seen = self._add("Cast", [column], _FLOAT, [self._batch, 1], to=_FLOAT.value)
        zero = add_weight(self.graph, f"{_NAME}/zero", np.float32(0))
        valid = self._add("Div", [zero, seen], _FLOAT, [self._batch, 1])
        readers = list(output.uses())
        guarded = self._add("Add", [output, valid], _FLOAT, output.shape)
        for use in readers:
            use.node.replace_input_with(use.idx, guarded)

    def _restore(self, node: onnx_ir.Node) -> None:
        """Give a pool its padded states; zeros stand for padding, so it must multiply these by the mask."""
        if node.op_type != "Mul" or not any(self._is_mask(value) for value in node.inputs):
            raise self._refusal(node)
        for index, value in enumerate(node.inputs):
            if value in self.packed and value is not None:
                node.replace_input_with(index, self._padded(value))

    def _padded(self, value: onnx_ir.Value) -> onnx_ir.Value:
        if value not in self._restored:
            assert self._offsets.shape is not None
            assert value.shape is not None
            shape = [*self._offsets.shape, value.shape[1]]
            self._restored[value] = self._add(
                "RestorePadding", [value, self._offsets], _FLOAT, shape, domain=CONTRIB
            )
        return self._restored[value]

    def _is_mask(self, value: onnx_ir.Value | None) -> bool:
        """Return whether a value is the mask in another type or shape."""
        readers = [node for node, _ in self._pooling]
        node = producer(value)
        while node is not None and node.op_type in ("Cast", "Unsqueeze", "Expand"):
            if node in readers:
                return True
            node = producer(node.inputs[0])
        return False

    def close(self) -> None:
        """Check that no padded attention is left."""
        if left := [str(node.name) for node in self.graph if node.op_type == "MultiHeadAttention"]:
            raise ExportError(
                f"The texts of {self.graph.name!r} cannot be packed: {left[0]} reads other tokens. Export it "
                "without packed text, and report the checkpoint's architecture."
            )

    def _refusal(self, node: onnx_ir.Node) -> ExportError:
        return ExportError(
            f"The texts of {self.graph.name!r} cannot be packed: {node.name} ({node.op_type}) reads padded "
            "tokens. Export it without packed text, and report the checkpoint's architecture."
        )

    @property
    def _batch(self) -> Any:
        assert self.mask.shape is not None
        return self.mask.shape[0]

    def _ints(self, name: str, values: int | Sequence[int]) -> onnx_ir.Value:
        array: NDArray[np.int64] = np.array(values, np.int64)
        return add_weight(self.graph, f"{_NAME}/{name}", array)

    def _add(
        self,
        op: str,
        inputs: Sequence[onnx_ir.Value | None],
        dtype: onnx_ir.DataType,
        shape: onnx_ir.Shape | Sequence[Any] | None,
        *,
        domain: str = "",
        **attributes: int,
    ) -> onnx_ir.Value:
        """Append a node with one output; the graph is sorted in the end."""
        given: Mapping[str, int] = attributes
        name = f"{_NAME}/{op}_{len(self.graph)}"
        node = onnx_ir.node(op, inputs, given, domain=domain, name=name)
        self.graph.append(node)
        output = node.outputs[0]
        output.name, output.dtype = f"{name}_out", dtype
        output.shape = None if shape is None else onnx_ir.Shape(shape)
        return output


def _uses_outside_attention(mask: onnx_ir.Value) -> list[tuple[onnx_ir.Node, int]]:
    """Return the uses of the mask that do not lead to an attention: those of a pool."""
    return [(use.node, use.idx) for use in mask.uses() if not _leads_to_attention(use.node)]


def _leads_to_attention(node: onnx_ir.Node) -> bool:
    """Return whether a node is part of the padding bias."""
    pending, seen = [node], set()
    while pending:
        one = pending.pop()
        if one.op_type == "MultiHeadAttention":
            return True
        if one in seen or any(len(value.shape or ()) == 3 for value in one.outputs):
            continue
        seen.add(one)
        pending += one.successors()
    return False


def _lookups(value: onnx_ir.Value) -> list[onnx_ir.Node]:
    """Return the table lookups that a value is computed from."""
    found: list[onnx_ir.Node] = []
    pending = [value.producer()]
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if node.op_type == "Gather" and constant(node.inputs[0]) is not None:
            found.append(node)
        else:
            pending += [part.producer() for part in node.inputs if part is not None]
    return found


def _state(value: onnx_ir.Value, name: str, dtype: onnx_ir.DataType, shape: Sequence[Any]) -> None:
    value.name, value.dtype, value.shape = f"{_NAME}/{name}", dtype, onnx_ir.Shape(shape)
