"""Requests of one item each over gRPC: of clients that wait for their answers, or arriving by themselves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.errors import BabeltowerError

__all__ = ["Answers", "Item", "closed_loop", "open_loop"]

Item = dict[str, bytes]
"""Tensor name → its one value."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Milliseconds of every request, in the order of sending; seconds from the first to the last."""

    latencies_ms: list[float]
    seconds: float

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return len(self.latencies_ms) / self.seconds


def closed_loop(address: str, model: str, items: Sequence[Item], n_clients: int) -> Answers:
    """Every client sends its next request when it has its answer.

    Raises:
        BabeltowerError: a request failed.
    """

    async def run() -> Answers:
        latencies = [0.0] * len(items)
        todo = iter(range(len(items)))

        async def client_loop(client: Any) -> None:
            for i in todo:
                started = time.perf_counter()
                await _infer(client, model, items[i])
                latencies[i] = (time.perf_counter() - started) * 1e3

        async with _client(address) as client:
            started = time.perf_counter()
            await asyncio.gather(*(client_loop(client) for _ in range(n_clients)))
            return Answers(latencies, time.perf_counter() - started)

    return asyncio.run(run())


def open_loop(address: str, model: str, items: Sequence[Item], per_s: float, *, seed: int = 0) -> Answers:
    """Requests arrive at random times of a mean rate (Poisson), whether others are answered or not.

    A request's time counts from its arrival, so that what waits to be sent is not left out.

    Raises:
        BabeltowerError: a request failed.
    """
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / per_s, len(items)))

    async def run() -> Answers:
        async with _client(address) as client:
            started = time.perf_counter()

            async def request(item: Item, arrival: float) -> float:
                await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
                await _infer(client, model, item)
                return (time.perf_counter() - started - arrival) * 1e3

            requests = [request(item, float(at)) for item, at in zip(items, arrivals, strict=True)]
            latencies = await asyncio.gather(*requests)
            return Answers(list(latencies), time.perf_counter() - started)

    return asyncio.run(run())


def _client(address: str) -> Any:
    from tritonclient.grpc.aio import InferenceServerClient

    return InferenceServerClient(address)


async def _infer(client: Any, model: str, item: Item) -> Any:
    from tritonclient.grpc import InferInput
    from tritonclient.utils import InferenceServerException

    inputs = []
    for name, value in item.items():
        tensor = InferInput(name, [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[value]], dtype=np.object_))
        inputs.append(tensor)
    try:
        return await client.infer(model, inputs)
    except InferenceServerException as error:
        raise BabeltowerError(f"{model} refused a request under load: {error}") from error
