"""Errors of the gateway: in OpenAI's shape for ``/v1``, KServe's for ``/v2``, immich's for ``/predict``."""

from __future__ import annotations

from starlette.responses import JSONResponse

from runtime.errors import BabeltowerError, InputError, LanguageError, ServerError
from runtime.preprocessing.text import NEEDS_LANGUAGE

__all__ = ["IMMICH_PATH", "GatewayError", "error_of_failure", "response_of_error"]

IMMICH_PATH = "/predict"
"""Path of immich's protocol."""

_RETRY_AFTER = "1"
_HOW = (
    ' Send "language": "pt", a FLORES-200 code or BCP-47 tag, in the request, or start `babeltower serve` '
    "with --default-language."
)
_LONGEST_MESSAGE = 1_000
"""Messages name what was asked, which may be as long as a body."""


class GatewayError(Exception):
    """Refusal or failure of a request, with its HTTP status.

    Attributes:
        param: Field of the request that is wrong.
        code: Short name of the reason, for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_of_failure(error: BabeltowerError) -> GatewayError:
    """Convert a failure of a model to the gateway's error."""
    if isinstance(error, LanguageError) and NEEDS_LANGUAGE in str(error):
        start = str(error).partition(NEEDS_LANGUAGE)[0]
        return GatewayError(400, start + NEEDS_LANGUAGE + _HOW, param="language", code="invalid_input")
    if isinstance(error, InputError):
        return GatewayError(400, str(error), param="input", code="invalid_input")
    if isinstance(error, ServerError):
        return GatewayError(503, str(error), code="model_unavailable")
    return GatewayError(500, str(error), code="model_failed")


def response_of_error(error: GatewayError, path: str) -> JSONResponse:
    """Return the answer to a request for ``path``."""
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 503:
        headers["retry-after"] = _RETRY_AFTER
    if path.startswith("/v2"):
        return JSONResponse({"error": error.message}, error.status, headers)
    if path == IMMICH_PATH:
        return JSONResponse({"detail": error.message}, error.status, headers)
    told = {
        "message": error.message,
        "type": "invalid_request_error" if error.status < 500 else "server_error",
        "param": error.param,
        "code": error.code,
    }
    return JSONResponse({"error": told}, error.status, headers)
