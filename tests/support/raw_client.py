"""Requests with NVIDIA's own client, as a client that this project did not write sends them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Inputs = Mapping[str, NDArray[Any]]


def bytes_column(items: Sequence[str | bytes]) -> NDArray[Any]:
    return np.array([[i.encode() if isinstance(i, str) else i] for i in items], dtype=np.object_)


def infer(client: Any, module: Any, model: str, inputs: Inputs, **options: Any) -> Any:
    tensors = []
    for name, array in inputs.items():
        kind = {"int32": "INT32", "int64": "INT64"}.get(array.dtype.name, "BYTES")
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return client.infer(model, tensors, **options)
