"""Registry of peers. To add one, add a line here, a loop in ``isolated/loops`` and its requirements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from runtime.manifest import Precision

__all__ = ["OWN", "PEERS", "Peer", "Stage"]


class Stage(str, Enum):
    """Start of a run: at token ids and pixels, or at strings and image files."""

    PREPARED = "prepared"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Peer:
    """Library and settings that run the models.

    Attributes:
        environment: Name of its pinned requirements; ``None`` is the suite's own interpreter.
        loop: Module of ``isolated/loops``.
        options: Further options of the loop.
    """

    name: str
    environment: str | None
    loop: str
    engine: str
    precision: Precision
    stage: Stage
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """True for this project."""
        return self.environment is None

    @property
    def key(self) -> str:
        """Unique key."""
        return f"{self.name}/{self.engine}/{self.precision.value}/{self.stage.value}"


_FP32, _BF16, _INT8 = Precision.FP32, Precision.BF16, Precision.INT8
_PREPARED, _WHOLE = Stage.PREPARED, Stage.WHOLE
_ST, _OPTIMUM, _INTEL = "sentence-transformers", "optimum-onnx", "optimum-intel"

OWN = tuple(
    Peer("babeltower", None, "babeltower", engine, precision, stage)
    for stage in Stage
    for engine, precision in (
        ("onnxruntime", _FP32),
        ("openvino", _FP32),
        ("openvino", _BF16),
        ("onnxruntime", _INT8),
        ("openvino", _INT8),
    )
)

PEERS = (
    Peer("PyTorch eager", "pytorch", "pytorch", "torch", _FP32, _PREPARED, {"mode": "eager"}),
    Peer("torch.compile", "pytorch", "pytorch", "torch", _FP32, _PREPARED, {"mode": "compile"}),
    Peer("PyTorch bf16", "pytorch", "pytorch", "torch", _BF16, _PREPARED, {"mode": "bf16"}),
    Peer("OpenVINO", "openvino", "openvino_nncf", "openvino", _FP32, _PREPARED),
    Peer("OpenVINO bf16", "openvino", "openvino_nncf", "openvino", _BF16, _PREPARED),
    Peer("OpenVINO, NNCF", "openvino", "openvino_nncf", "openvino", _INT8, _PREPARED),
    Peer("ORT optimizer", "onnxruntime", "onnxruntime_optimizer", "onnxruntime", _FP32, _PREPARED),
    Peer("ORT optimizer int8", "onnxruntime", "onnxruntime_optimizer", "onnxruntime", _INT8, _PREPARED),
    Peer("optimum-onnx", _OPTIMUM, "optimum_onnx", "onnxruntime", _FP32, _PREPARED),
    Peer("open_clip loop", "pytorch", "open_clip_loop", "torch", _FP32, _WHOLE),
    Peer("transformers loop", "pytorch", "transformers_loop", "torch", _FP32, _WHOLE),
    Peer(_ST, _ST, "sentence_transformers_loop", "torch", _FP32, _WHOLE, {"backend": "torch"}),
    Peer(
        f"{_ST} ONNX",
        _OPTIMUM,
        "sentence_transformers_loop",
        "onnxruntime",
        _FP32,
        _WHOLE,
        {"backend": "onnx"},
    ),
    Peer(
        f"{_ST} OpenVINO",
        _INTEL,
        "sentence_transformers_loop",
        "openvino",
        _FP32,
        _WHOLE,
        {"backend": "openvino"},
    ),
    Peer("infinity", "infinity", "infinity_engine", "torch", _FP32, _WHOLE),
    Peer("fastembed", "fastembed", "fastembed_model", "onnxruntime", _FP32, _WHOLE),
    Peer("clip-retrieval", "clip-retrieval", "clip_retrieval_model", "torch", _FP32, _WHOLE),
)
