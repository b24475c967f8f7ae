"""The gateway as an ASGI application."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import metadata

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from runtime.gateway.embeddings import EmbeddingRoutes
from runtime.gateway.failures import IMMICH_PATH, GatewayError, response_of_error
from runtime.gateway.guard import Guard
from runtime.gateway.immich import ImmichRoutes
from runtime.gateway.metrics import GatewayMetrics, Timed
from runtime.gateway.models import GatewayModel, ModelOpener
from runtime.gateway.openapi import openapi_document, openapi_page
from runtime.gateway.options import GatewayOptions, GrpcDoor, TritonEndpoint
from runtime.gateway.other_tasks import OtherTasks
from runtime.gateway.triton import TritonRoutes
from runtime.logs import LOGGER

__all__ = ["gateway_app"]

_Endpoint = Callable[[Request], Awaitable[Response]]


def gateway_app(
    openers: Sequence[ModelOpener],
    options: GatewayOptions,
    *,
    triton: TritonEndpoint | None = None,
    grpc: GrpcDoor | None = None,
) -> Starlette:
    """Return the application; its models are opened when it starts, and closed when it ends.

    Args:
        openers: Models of ``/v1`` and of immich's ``/predict``; without any, there is neither.
        triton: Server whose ``/v2`` and ``/metrics`` are forwarded.
        grpc: gRPC that is answered as long as the application runs.
    """
    metrics = GatewayMetrics()
    models: dict[str, GatewayModel] = {}
    forwarding: list[TritonRoutes] = []
    others: list[OtherTasks] = []

    @contextlib.asynccontextmanager
    async def opened(_: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for opener in openers:
                model = await opener()
                stack.push_async_callback(model.close)
                models[model.name] = model
            if options.other_tasks_url is not None:
                others.append(OtherTasks(options.other_tasks_url))
                stack.push_async_callback(others[0].close)
            if triton is not None:
                forwarding.append(TritonRoutes(triton, metrics))
                stack.push_async_callback(forwarding[0].close)
            if grpc is not None:
                from runtime.gateway.grpc_guard import running_grpc_guard

                guard = running_grpc_guard(grpc.upstream, grpc.host, grpc.port, options)
                grpc.bound.append(await stack.enter_async_context(guard))
            yield

    async def forwarded(request: Request) -> Response:
        return await forwarding[0].forwarded(request)

    async def all_metrics(request: Request) -> Response:
        if triton is not None:
            return await forwarding[0].metrics(request)
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    routes = [Route("/health", _healthy), Route("/metrics", all_metrics)]
    if openers:
        routes += _openai_routes(EmbeddingRoutes(models, options, metrics, created=int(time.time())), options)
        routes += _immich_routes(ImmichRoutes(models, options, metrics, others))
    if triton is not None:
        routes += [Route(path, forwarded, methods=["GET", "POST"]) for path in ("/v2", "/v2/{rest:path}")]
    return Starlette(
        routes=routes,
        lifespan=opened,
        middleware=[Middleware(Timed, metrics=metrics), Middleware(Guard, options=options)],
        exception_handlers={
            GatewayError: _answered_error,
            HTTPException: _answered_exception,
            Exception: _answered_fault,
        },
    )


def _openai_routes(routes: EmbeddingRoutes, options: GatewayOptions) -> list[Route]:
    document = openapi_document(version=metadata.version("babeltower"), has_token=options.token is not None)
    page = openapi_page(document)

    async def description(_: Request) -> Response:
        return JSONResponse(document)

    async def described(_: Request) -> Response:
        return HTMLResponse(page)

    return [
        Route("/v1/embeddings", routes.embeddings, methods=["POST"]),
        Route("/v1/models", routes.models),
        Route("/v1/models/{name}", routes.model),
        Route("/openapi.json", description),
        Route("/docs", described),
    ]


def _immich_routes(routes: ImmichRoutes) -> list[Route]:
    return [
        Route("/", routes.root),
        Route("/ping", routes.ping),
        Route(IMMICH_PATH, routes.predict, methods=["POST"]),
    ]


async def _healthy(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _answered_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return response_of_error(error, request.url.path)


async def _answered_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "There is no such path.", 405: "The path does not answer this method."}
    message = said.get(error.status_code, str(error.detail))
    return response_of_error(GatewayError(error.status_code, message), request.url.path)


async def _answered_fault(request: Request, error: Exception) -> Response:
    LOGGER.error("a request for %s failed", request.url.path, exc_info=error)
    return response_of_error(GatewayError(500, "The gateway failed; its log says why."), request.url.path)
