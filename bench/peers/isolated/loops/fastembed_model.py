"""fastembed: its text or image class on the checkpoint's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def opened(task: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Open the model; an unsupported one fails with fastembed's own error."""
    from fastembed import ImageEmbedding, TextEmbedding

    kind, key = (TextEmbedding, "texts") if task["tower"] == "text" else (ImageEmbedding, "files")
    model = kind(model_name=task["checkpoint"], specific_model_path=task["checkpoint"], threads=1)
    return lambda inputs: np.stack(list(model.embed([str(value) for value in inputs[key]])))
