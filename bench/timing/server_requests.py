"""Open-loop gRPC load generator: requests arrive independently of earlier answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError

__all__ = ["open_loop"]

_METHOD = "/inference.GRPCInferenceService/ModelInfer"


def open_loop(
    address: str, requests: Sequence[bytes], *, per_s: float, n: int, seed: int = 0
) -> NDArray[np.float64]:
    """Send ``n`` requests at random times of a mean rate (Poisson).

    Args:
        requests: Built by ``export.tuning.load_generator``; sent in order, repeatedly.

    Returns:
        float64 (n,): milliseconds of each request, in order of arrival. Time counts from a request's arrival,
        not from its sending, so that waiting is included.

    Raises:
        EngineError: a request was not answered.
    """
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / per_s, n))

    async def run() -> list[float]:
        async with _channel(address) as channel:
            call = channel.unary_unary(_METHOD)
            started = time.perf_counter()

            async def request(i: int, arrival: float) -> float:
                await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
                await _answered(call, requests[i % len(requests)])
                return (time.perf_counter() - started - arrival) * 1e3

            return list(await asyncio.gather(*(request(i, float(at)) for i, at in enumerate(arrivals))))

    return np.asarray(asyncio.run(run()))


def _channel(address: str) -> Any:
    import grpc

    return grpc.aio.insecure_channel(address)


async def _answered(call: Any, request: bytes) -> None:
    import grpc

    try:
        await call(request)
    except grpc.aio.AioRpcError as error:
        raise EngineError(
            f"The server refused a request under load: {error.code().name}: {error.details()}"
        ) from error
