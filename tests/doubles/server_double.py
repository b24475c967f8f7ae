"""A server of two front ends in this process: it is lost, refuses, or changes when a test says so."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from runtime.errors import InputError
from triton_models.spec import TextLimits, parameters_from_limits
from triton_models.tensors import text_rows

DIM, NARROW = 12, 4


def vector_of(item: bytes, dim: int = DIM) -> np.ndarray:
    """What the double answers: a unit vector that depends on the bytes alone."""
    seed = int.from_bytes(hashlib.sha256(item).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return vector / np.linalg.norm(vector)


@dataclass
class Double(service_pb2_grpc.GRPCInferenceServiceServicer):
    """State of the double; tests change it while requests come in.

    ``fail_next`` are gRPC statuses of the next requests. ``die_after`` requests it answers no more.
    ``shared_memory_error`` is the status and message with which it refuses shared memory.
    ``limits`` are those of a text front end, checked by its own code.
    """

    fingerprints: dict[str, str] = field(default_factory=lambda: {"text": "bt1:a", "image": "bt1:a"})
    version: str = "1"
    fail_next: list[grpc.StatusCode] = field(default_factory=list)
    die_after: int | None = None
    dtype: type = np.float32
    metadata: list[dict[str, str]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    regions: dict[str, str] = field(default_factory=dict)
    shared_memory_error: tuple[grpc.StatusCode, str] | None = None
    limits: TextLimits | None = None
    in_flight: int = 0
    most_in_flight: int = 0

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        name, _, modality = request.name.rpartition("_")
        if name != "double":
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.name!r}")
        config = model_config_pb2.ModelConfig(name=request.name, max_batch_size=8)
        config.output.add(name="vector", data_type=model_config_pb2.TYPE_FP32, dims=[-1])
        facts = {
            "name": name, "fingerprint": self.fingerprints[modality], "variant": "fp32", "precision": "fp32",
            "engine": "onnxruntime", "dim": str(DIM), "dims": f"{NARROW},{DIM}",
        }  # fmt: skip
        for key, value in facts.items():
            config.parameters[f"babeltower_{key}"].string_value = value
        if self.limits is not None:
            for key, value in parameters_from_limits(self.limits).items():
                config.parameters[key].string_value = value
        return service_pb2.ModelConfigResponse(config=config)

    def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.shared_memory_error is not None:
            context.abort(*self.shared_memory_error)
        self.regions[request.name] = request.key.lstrip("/")
        return service_pb2.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.regions.pop(request.name, None)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return self._answer(request, context)
        finally:
            self.in_flight -= 1

    def _answer(self, request: Any, context: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        if self.die_after is not None and len(self.batches) >= self.die_after:
            context.abort(grpc.StatusCode.UNAVAILABLE, "server is stopping")
        if self.fail_next:
            context.abort(self.fail_next.pop(0), "as the test asked")
        for tensor in request.inputs:
            if "shared_memory_region" not in tensor.parameters:
                continue
            if (name := tensor.parameters["shared_memory_region"].string_param) not in self.regions:
                context.abort(grpc.StatusCode.NOT_FOUND, f"Unable to find shared memory region: '{name}'")
        items, dim = self._items(request)
        if self.limits is not None:
            self._require_short(items, self.limits, context)
        if b"klingon" in items:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "LanguageError: Language 'tlh' is unknown.")
        if b"broken" in items:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "ImageError: its format is unknown")
        self.batches.append(len(items))
        vectors = np.stack([vector_of(item, dim) for item in items]).astype(self.dtype)
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=self.version)
        datatype = "FP32" if self.dtype is np.float32 else "FP64"
        response.outputs.add(name="vector", datatype=datatype, shape=vectors.shape)
        response.raw_output_contents.append(vectors.tobytes())
        return response

    @staticmethod
    def _require_short(items: Sequence[bytes], limits: TextLimits, context: Any) -> None:
        tensor = np.asarray(items, dtype=object).reshape(-1, 1)
        try:
            texts = text_rows(
                tensor, "text", max_bytes=limits.max_bytes, max_characters=limits.max_characters
            )
        except InputError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"InputError: {error}")
        if sum(map(len, texts)) > limits.max_request_characters:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "InputError: Send fewer texts in a request.")

    def _items(self, request: Any) -> tuple[Sequence[bytes], int]:
        items: list[bytes] = []
        dim, raw = DIM, iter(request.raw_input_contents)
        for tensor in request.inputs:
            if "shared_memory_region" in tensor.parameters:
                name = tensor.parameters["shared_memory_region"].string_param
                size = tensor.parameters["shared_memory_byte_size"].int64_param
                memory = SharedMemory(self.regions[name])
                data = bytes(memory.buf[:size])
                memory.close()
            else:
                data = next(raw)
            if tensor.name in ("text", "image"):
                items = _strings(data)
            elif tensor.name == "dim":
                dim = int(np.frombuffer(data, np.int32)[0])
        return items, dim


def _strings(data: bytes) -> list[bytes]:
    found, offset = [], 0
    while offset < len(data):
        (size,) = struct.unpack_from("<I", data, offset)
        found.append(data[offset + 4 : offset + 4 + size])
        offset += 4 + size
    return found


class Running:
    """A double on a port; it can be killed, and started again on the same port."""

    def __init__(self, double: Double) -> None:
        self.double = double
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen, on the port of before."""
        self._server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 1)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self.double, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def kill(self) -> None:
        """Drop every connection at once."""
        self._server.stop(grace=None).wait()

    @property
    def address(self) -> str:
        """For ``Encoder.open``."""
        return f"grpc://127.0.0.1:{self.port}/double"
