"""Graph passes that take a server's own inputs, on graphs that show what reaches the tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from export.graphs.normalised_images import take_normalised_images
from export.graphs.padded_texts import LanguageTokens, take_padded_texts
from export.onnx_graph import IR_VERSION, OPSET

PAD, END, ENGLISH, PORTUGUESE, SECOND = 1, 2, 90, 91, 120
LENGTH = 8


def shown(*inputs: onnx_ir.Value) -> onnx_ir.Model:
    """A graph that returns its inputs."""
    nodes = [onnx_ir.node("Identity", [value], name=f"show/{value.name}") for value in inputs]
    for node, value in zip(nodes, inputs, strict=True):
        output = node.outputs[0]
        output.name, output.type, output.shape = f"seen_{value.name}", value.type, value.shape
    graph = onnx_ir.Graph(
        inputs, [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": OPSET}, name="shown"
    )
    return onnx_ir.Model(graph, ir_version=IR_VERSION)


def value(name: str, dtype: onnx_ir.DataType, shape: list[str | int]) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(shape))


def texts_graph(path: Path, languages: LanguageTokens | None) -> onnxruntime.InferenceSession:
    int64 = onnx_ir.DataType.INT64
    model = shown(*(value(name, int64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")))
    take_padded_texts(model, name="text", pad_id=PAD, context_length=LENGTH, languages=languages)
    onnx_ir.save(model, path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def padded(*rows: list[int]) -> NDArray[np.int32]:
    return np.array([row + [PAD] * (LENGTH - len(row)) for row in rows], np.int32)


def run(session: onnxruntime.InferenceSession, rows: NDArray[np.int32]) -> tuple[list[object], list[object]]:
    ids, mask = session.run(None, {"text": rows})
    return ids.tolist(), mask.tolist()


@pytest.mark.parametrize("n_tokens", range(1, LENGTH + 1))
def test_columns_behind_a_text_are_cut(n_tokens: int, tmp_path: Path) -> None:
    session = texts_graph(tmp_path / "m.onnx", None)
    row = [5] * (n_tokens - 1) + [END]
    assert run(session, padded(row)) == ([row], [[1] * n_tokens])


def test_a_batch_is_cut_behind_its_longest_text(tmp_path: Path) -> None:
    session = texts_graph(tmp_path / "m.onnx", None)
    ids, mask = run(session, padded([0, 5, END], [0, 5, 6, 7, END], [0, END]))
    assert ids == [[0, 5, END, PAD, PAD], [0, 5, 6, 7, END], [0, END, PAD, PAD, PAD]]
    assert mask == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_padding_inside_a_text_is_part_of_it(tmp_path: Path) -> None:
    session = texts_graph(tmp_path / "m.onnx", None)
    row = [0, 5, PAD, PAD, 6, END]
    assert run(session, padded(row)) == ([row], [[1] * 6])


def test_a_row_of_padding_keeps_one_column(tmp_path: Path) -> None:
    session = texts_graph(tmp_path / "m.onnx", None)
    assert run(session, padded([])) == ([[PAD]], [[1]])


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ([PORTUGUESE, 5, END], [PORTUGUESE, 5, END]),
        ([5, 6, END], [ENGLISH, 5, 6, END]),
        ([END], [ENGLISH, END]),
        ([SECOND, 5, END], [PORTUGUESE, 5, END]),
        ([5, PORTUGUESE, END], [ENGLISH, 5, PORTUGUESE, END]),
        ([3, 4, 5, 6, 7, 8, END], [ENGLISH, 3, 4, 5, 6, 7, 8, END]),
        ([3, 4, 5, 6, 7, 8, 9, END], [ENGLISH, 3, 4, 5, 6, 7, 8, END]),
        ([PORTUGUESE, 4, 5, 6, 7, 8, 9, END], [PORTUGUESE, 4, 5, 6, 7, 8, 9, END]),
    ],
)
def test_every_text_begins_with_a_language(row: list[int], seen: list[int], tmp_path: Path) -> None:
    languages = LanguageTokens(ENGLISH, [ENGLISH, PORTUGUESE], {SECOND: PORTUGUESE})
    session = texts_graph(tmp_path / "m.onnx", languages)
    assert run(session, padded(row)) == ([seen], [[1] * len(seen)])


def test_rows_of_a_batch_have_their_own_languages(tmp_path: Path) -> None:
    session = texts_graph(tmp_path / "m.onnx", LanguageTokens(ENGLISH, [ENGLISH, PORTUGUESE]))
    ids, _ = run(session, padded([PORTUGUESE, 5, END], [5, END]))
    assert ids == [[PORTUGUESE, 5, END], [ENGLISH, 5, END]]


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_every_pixel_is_recovered(mean: tuple[float, ...], std: tuple[float, ...], tmp_path: Path) -> None:
    model = shown(value("pixels", onnx_ir.DataType.UINT8, ["batch", 3, 16, 16]))
    take_normalised_images(model, name="image", mean=mean, std=std)
    onnx_ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    pixels = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (16, 16, 3))
    # as the service computes it, in float32
    image = np.asarray(pixels, np.float32) / 255.0
    image *= 1.0 / np.array(std, np.float32)
    image -= np.array(mean, np.float32) / np.array(std, np.float32)
    (seen,) = session.run(None, {"image": image.transpose(2, 0, 1)[None]})
    assert seen.dtype == np.uint8
    assert np.array_equal(seen[0].transpose(1, 2, 0), pixels)
