"""HTTP gateway: an OpenAI-compatible door for plain clients, and the guard of Triton's own HTTP endpoint.

    app.py          routes, and what is opened and closed with them
    protocol.py     HTTP with bounds on heads and connections
    guard.py        token, size and number of bodies, before any route sees a request
    inputs.py       the body of ``POST /v1/embeddings`` as texts and images
    embeddings.py   ``/v1/embeddings`` and ``/v1/models``
    models.py       one interface for models on a server and in this process
    batching.py     requests of several clients as one batch, for models in this process
    triton.py       ``/v2`` and ``/metrics`` of a Triton server behind the gateway
    nesting.py      depth and values of JSON, without parsing it
    memory.py       memory given back after large requests
    failures.py     errors in the shapes that clients of either protocol expect
    openapi.py      description of the interface, and a page of it
    metrics.py      counters in Prometheus' format
    serving.py      the gateway on a port, with TLS

Needs the extra ``babeltower[gateway]``.
"""

from __future__ import annotations

from runtime.gateway.options import GatewayOptions

__all__ = ["GatewayOptions"]
