"""Counters of the gateway, in Prometheus' format."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["GatewayMetrics", "Timed"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROUTES = (
    "/v1/embeddings", "/v1/models", "/v2/models", "/v2/health", "/v2", "/predict", "/ping", "/metrics",
    "/health",
)  # fmt: skip


class GatewayMetrics:
    """Counters of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "babeltower_gateway_requests",
            "Requests answered, by route and status",
            ("route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "babeltower_gateway_request_seconds",
            "Time to answer a request",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.running = Gauge(
            "babeltower_gateway_running_requests", "Requests being answered", registry=self.registry
        )
        self._inputs = Counter(
            "babeltower_gateway_inputs",
            "Inputs embedded, by model and kind",
            ("model", "kind"),
            registry=self.registry,
        )

    def count_inputs(self, model: str, *, n_texts: int, n_images: int) -> None:
        """Count embedded inputs."""
        for kind, amount in (("text", n_texts), ("image", n_images)):
            if amount:
                self._inputs.labels(model, kind).inc(amount)

    def page(self) -> bytes:
        """Return the metrics page."""
        page: bytes = generate_latest(self.registry)
        return page


class Timed:
    """ASGI middleware that counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        start = time.perf_counter()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        route = next((known for known in _ROUTES if scope["path"].startswith(known)), "other")
        with self._metrics.running.track_inprogress():
            try:
                await self._app(scope, receive, counted)
            finally:
                self._metrics.requests.labels(route, str(status)).inc()
                self._metrics.seconds.labels(route).observe(time.perf_counter() - start)
