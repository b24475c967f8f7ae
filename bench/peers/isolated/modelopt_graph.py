"""Quantize a graph with nvidia-modelopt; run by ``bench.int8_peers`` in an environment that holds it.

    python bench/peers/isolated/modelopt_graph.py GRAPH.onnx TARGET.onnx BATCHES.npz max|entropy

``BATCHES.npz`` holds the arrays ``0/input_ids``, ``0/attention_mask``, ``1/input_ids``, …
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np


class Reader:
    """Calibration data reader for modelopt."""

    def __init__(self, path: str) -> None:
        arrays = np.load(path)
        batches: dict[int, dict[str, Any]] = {}
        for key in arrays.files:
            number, name = key.split("/")
            batches.setdefault(int(number), {})[name] = arrays[key]
        self._batches = [batches[number] for number in sorted(batches)]
        self._left: Iterator[dict[str, Any]] = iter(self._batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, or ``None`` after the last."""
        return next(self._left, None)

    def get_first(self) -> dict[str, Any]:
        """Return the first batch; modelopt reads its shapes."""
        return self._batches[0]

    def rewind(self) -> None:
        """Start again from the first batch."""
        self._left = iter(self._batches)


def main(source: str, target: str, batches: str, method: str) -> None:
    """Quantize a graph; parts left in high precision stay FP32."""
    import importlib

    # Imported by name, since the project's own environment, where types are checked, lacks it.
    quantize = importlib.import_module("modelopt.onnx.quantization").quantize

    quantize(
        source,
        quantize_mode="int8",
        calibration_data_reader=Reader(batches),
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=target,
        log_level="ERROR",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
