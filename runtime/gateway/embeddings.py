"""``POST /v1/embeddings`` and ``GET /v1/models``, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runtime.errors import BabeltowerError
from runtime.gateway.failures import GatewayError, error_of_failure
from runtime.gateway.guard import body_of_request
from runtime.gateway.inputs import EmbeddingInputs, EmbeddingRequest, inputs_of_request, request_from_body
from runtime.gateway.metrics import GatewayMetrics
from runtime.gateway.models import GatewayModel, gathered
from runtime.gateway.options import GatewayOptions

__all__ = ["EmbeddingRoutes"]

_NAME_PART = 100
_LEFT = 499
"""Status in the metrics of a request whose sender left; nobody receives it."""

T = TypeVar("T")


class EmbeddingRoutes:
    """Routes of the models behind the gateway.

    Args:
        models: Open models by name; filled when the application starts.
        created: Unix time that ``/v1/models`` reports, since clients expect one.
    """

    def __init__(
        self,
        models: Mapping[str, GatewayModel],
        options: GatewayOptions,
        metrics: GatewayMetrics,
        *,
        created: int,
    ) -> None:
        self._models = models
        self._options = options
        self._metrics = metrics
        self._created = created

    async def embeddings(self, request: Request) -> Response:
        """Answer ``POST /v1/embeddings``; the work ends when the sender leaves."""
        asked = request_from_body(body_of_request(request))
        model = self._model(asked.model)
        dim = _width(asked, model)
        inputs = inputs_of_request(asked, self._options)
        asked.input = None
        try:
            vectors = await while_connected(request, _embedded(model, inputs, dim))
        except BabeltowerError as error:
            raise error_of_failure(error) from error
        self._metrics.count_inputs(model.name, n_texts=len(inputs.texts), n_images=len(inputs.images))
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": i, "embedding": _encoded(vector, asked)}
                    for i, vector in enumerate(vectors)
                ],
                "model": model.name,
                "usage": {"prompt_tokens": 0, "total_tokens": 0},
            }
        )

    async def models(self, _: Request) -> Response:
        """Answer ``GET /v1/models``."""
        found = [self._described(self._models[name]) for name in sorted(self._models)]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        """Answer ``GET /v1/models/NAME``."""
        return JSONResponse(self._described(self._model(request.path_params["name"])))

    def _model(self, name: str) -> GatewayModel:
        if name not in self._models:
            raise GatewayError(
                404,
                f"There is no model {_shortened(name)!r}; expected one of {sorted(self._models)}.",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    def _described(self, model: GatewayModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "babeltower",
            "dimensions": list(model.dims),
            "fingerprint": model.fingerprint,
        }


def _shortened(name: str) -> str:
    """Return a name as messages have it: it may be as long as a body."""
    return name if len(name) <= 2 * _NAME_PART else f"{name[:_NAME_PART]} … {name[-_NAME_PART:]}"


def _width(asked: EmbeddingRequest, model: GatewayModel) -> int:
    width = model.dims[-1] if asked.dimensions is None else asked.dimensions
    if width not in model.dims:
        raise GatewayError(
            400,
            f"There are no vectors of width {width}; {model.name} has {list(model.dims)}. Narrower widths "
            "have their own heads: truncated vectors are not valid.",
            param="dimensions",
            code="invalid_dimensions",
        )
    return width


async def _embedded(model: GatewayModel, inputs: EmbeddingInputs, dim: int) -> NDArray[np.float32]:
    """Embed texts and images; float32 (inputs, dim), in the order of the request."""
    vectors = np.empty((inputs.n_inputs, dim), np.float32)
    work: list[Awaitable[NDArray[np.float32]]] = []
    places: list[list[int]] = []
    if inputs.texts:
        work.append(model.texts(inputs.texts, dim))
        places.append([place for place, _, _ in inputs.texts])
    if inputs.images:
        work.append(model.images(inputs.images, dim))
        places.append([place for place, _ in inputs.images])
    for found, at in zip(await gathered(work), places, strict=True):
        vectors[at] = found
    return vectors


def _encoded(vector: NDArray[np.float32], asked: EmbeddingRequest) -> str | list[float]:
    if asked.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return [float(value) for value in vector]


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await work, and cancel it when the sender leaves.

    Raises:
        GatewayError: the sender left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GatewayError(_LEFT, "The sender left.")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
