"""Python-based backend ``onnxruntime``: serves unmodified towers if the C++ backend is missing."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))

from runtime.manifest import Engine
from triton_models.tower_model import TowerModel


class TritonPythonModel(TowerModel):
    """Model class loaded by Triton's Python backend."""

    engine = Engine.ONNXRUNTIME
