"""HTTP requests to a server on this machine; proxies of the environment are not for them."""

from __future__ import annotations

import urllib.request
from http.client import HTTPResponse

from runtime.server.readiness import UnixSocketHandler

__all__ = ["opened"]

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), UnixSocketHandler())


def opened(request: str | urllib.request.Request, *, timeout: float) -> HTTPResponse:
    """Send a request without a proxy; close the answer afterwards.

    Raises:
        HTTPError: the server answered with an error.
        OSError: it cannot be reached.
    """
    response: HTTPResponse = _OPENER.open(request, timeout=timeout)
    return response
