"""Closed-loop gRPC load generator.

Each client waits for a response before it sends the next request. Requests are built before the measurement
and responses parsed after it, so that clients on the server's machine use little CPU time.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.remote.tensors import bytes_from_strings

__all__ = ["Load", "image_requests", "load_of_server", "text_requests"]

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_MAX_MESSAGE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Measurements of a server under load.

    Attributes:
        seconds: Time from the first request to the last counted response.
        latencies_ms: Latencies, float64 (responses,), in order of arrival.
        vectors: Vector of the first response, by request index; unanswered requests are missing.
        failures: Number of failed requests by error message.
    """

    seconds: float
    latencies_ms: NDArray[np.float64]
    vectors: Mapping[int, NDArray[np.float32]]
    failures: Mapping[str, int]

    @property
    def rate(self) -> float:
        """Responses per second."""
        return len(self.latencies_ms) / self.seconds

    def percentile_ms(self, q: float) -> float:
        """Return a percentile of the latencies."""
        return float(np.percentile(self.latencies_ms, q))


def text_requests(model: str, texts: Sequence[str], languages: Sequence[str | None]) -> list[bytes]:
    """Build one request per text."""
    return [
        _request(model, {"text": text.encode()} | ({} if code is None else {"language": code.encode()}))
        for text, code in zip(texts, languages, strict=True)
    ]


def image_requests(model: str, files: Sequence[bytes]) -> list[bytes]:
    """Build one request per image file."""
    return [_request(model, {"image": file}) for file in files]


def load_of_server(
    address: str, requests: Sequence[bytes], *, clients: int, seconds: float | None = None
) -> Load:
    """Send requests in order, with ``clients`` of them in flight.

    Args:
        address: ``host:port`` of the server's gRPC endpoint.
        seconds: Duration of the load, repeating the requests; None sends each request once. Responses after
            that time are not counted.

    Raises:
        EngineError: no request was answered; the message has the server's error.
    """
    if not requests:
        raise EngineError("There are no requests to send; pass at least one.")
    answers = asyncio.run(_answers(address, requests, clients, seconds))
    first: dict[int, bytes] = {}
    latencies: list[float] = []
    failures: Counter[str] = Counter()
    for i, latency_ms, answer in answers.found:
        if isinstance(answer, str):
            failures[answer] += 1
        else:
            latencies.append(latency_ms)
            first.setdefault(i, answer)
    if not latencies:
        told = next(iter(failures), f"no response within {seconds} s")
        raise EngineError(f"None of {len(requests)} requests to {address} was answered: {told}")
    vectors = {i: _vector(answer) for i, answer in first.items()}
    return Load(answers.seconds, np.asarray(latencies), vectors, failures)


@dataclass(frozen=True, slots=True)
class _Answers:
    """Responses as (request index, milliseconds, response bytes or error message)."""

    seconds: float
    found: Sequence[tuple[int, float, bytes | str]]


async def _answers(address: str, requests: Sequence[bytes], clients: int, seconds: float | None) -> _Answers:
    import grpc

    numbers: Iterator[int] = iter(range(len(requests)))
    if seconds is not None:
        numbers = itertools.cycle(range(len(requests)))
    found: list[tuple[int, float, bytes | str]] = []
    options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call: Any = channel.unary_unary(_METHOD)
        started = last = time.perf_counter()
        until = float("inf") if seconds is None else started + seconds

        async def client() -> None:
            nonlocal last
            for i in numbers:
                sent = time.perf_counter()
                if sent >= until:
                    return
                answer: bytes | str
                try:
                    answer = await call(requests[i])
                except grpc.aio.AioRpcError as error:
                    answer = f"{error.code().name}: {error.details()}"
                now = time.perf_counter()
                if now <= until:
                    last = now
                    found.append((i, (now - sent) * 1e3, answer))

        await asyncio.gather(*(client() for _ in range(clients)))
        return _Answers(last - started if seconds is None else seconds, found)


def _request(model: str, inputs: Mapping[str, bytes]) -> bytes:
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        request.inputs.add(name=name, datatype="BYTES", shape=[1, 1])
        request.raw_input_contents.append(bytes_from_strings([value]))
    request.outputs.add(name="vector")
    return bytes(request.SerializeToString())


def _vector(answer: bytes) -> NDArray[np.float32]:
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse.FromString(answer)
    if len(response.raw_output_contents) != 1:
        raise EngineError(f"The server returned {len(response.raw_output_contents)} tensors; expected one.")
    return np.frombuffer(response.raw_output_contents[0], dtype="<f4")
