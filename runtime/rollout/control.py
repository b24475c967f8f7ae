"""Model control of a server over gRPC."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from runtime.errors import InputError, ServerError
from runtime.extras import needing
from runtime.remote.options import Address, Connection, WireProtocol
from runtime.remote.transport import channel_options
from runtime.triton_config import json_from_config

__all__ = ["Control"]

_LOAD_S = 600.0
_ASK_S = 30.0
_PAUSE_S = 0.2


_NO_MODEL = "babeltower-no-model"
"""Name that no model has: to unload it tells whether a server allows that, and does nothing."""

_CONTROL_REMEDY = (
    " Start the server with `babeltower serve --control`, and pass its token if it has one (--token-file)."
)


class Control:
    """Client that loads and unloads models of one server."""

    def __init__(self, address: Address, connection: Connection) -> None:
        if address.protocol is not WireProtocol.GRPC:
            raise InputError(f"A rollout needs gRPC, but {address} is HTTP. Pass grpc://HOST:PORT.")
        with needing("A rollout", "babeltower[client]"):
            from tritonclient import grpc
        self._address = address.target
        self._headers = connection.all_headers(address.protocol) or None
        ca, key, chain = (
            None if path is None else str(path)
            for path in (connection.ca_file, connection.key_file, connection.certificate_file)
        )
        self._client: Any = grpc.InferenceServerClient(
            address.target,
            channel_args=channel_options(address),
            ssl=address.tls,
            root_certificates=ca,
            private_key=key,
            certificate_chain=chain,
        )

    def load(self, config: Any) -> None:
        """Load a model with a configuration; served versions keep running until new ones are ready.

        The configuration is passed with the request: after such a request, Triton does not look at a changed
        ``config.pbtxt`` again, and files that say what is served need not be changed before it is.

        Args:
            config: ``inference.ModelConfig``; its name is the model's.

        Raises:
            ServerError: it does not load, or the server does not allow loading.
        """
        self._call(
            lambda name, **options: self._client.load_model(name, config=json_from_config(config), **options),
            config.name,
        )

    def require_serving(self, front_ends: Sequence[str], model: str) -> None:
        """Check that a server serves a model's front ends, and lets clients load models.

        Raises:
            ServerError: it does not, or cannot be reached.
        """
        from tritonclient.utils import InferenceServerException

        options = {"headers": self._headers, "client_timeout": _ASK_S}
        try:
            index = self._client.get_model_repository_index(**options)
            known = {found.name for found in index.models}
            if missing := sorted(set(front_ends) - known):
                served = sorted(found.name for found in index.models if found.state == "READY")
                raise ServerError(
                    f"The server at {self._address} does not serve {model}: it has no "
                    f"{' or '.join(missing)}, but {', '.join(served) or 'no model'}. Pass the address of the "
                    "server of this repository."
                )
        except InferenceServerException as error:
            raise self._refusal(error) from error
        try:
            self._client.unload_model(_NO_MODEL, **options)
        except InferenceServerException as error:
            if _is_forbidden(error):  # any other error is that there is no such model
                raise self._refusal(error) from error

    def _refusal(self, error: Any) -> ServerError:
        if _is_forbidden(error):
            return ServerError(
                f"The server at {self._address} does not let clients load models.{_CONTROL_REMEDY}"
            )
        return ServerError(f"{self._address}: {error.message().rstrip('.')}.")

    def unload(self, model: str) -> None:
        """Unload a model after its running requests end."""
        self._call(self._client.unload_model, model)

    def is_loaded(self, model: str) -> bool:
        """Check whether any version of a model is ready.

        Raises:
            ServerError: the server does not answer.
        """
        from tritonclient.utils import InferenceServerException

        try:
            return bool(self._client.is_model_ready(model, headers=self._headers, client_timeout=_ASK_S))
        except InferenceServerException as error:
            raise ServerError(f"{model}: {error.message().rstrip('.')}.") from error

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _call(self, method: Any, model: str) -> None:
        from tritonclient.utils import InferenceServerException

        for is_last in (False, False, True):
            try:
                method(model, headers=self._headers, client_timeout=_LOAD_S)
            except InferenceServerException as error:
                # Another command's file vanished while Triton listed the repository.
                if "failed to stat file" in error.message() and not is_last:
                    time.sleep(_PAUSE_S)
                    continue
                remedy = _CONTROL_REMEDY if _is_forbidden(error) else ""
                raise ServerError(f"{model}: {error.message().rstrip('.')}.{remedy}") from error
            return


def _is_forbidden(error: Any) -> bool:
    return "not allowed" in error.message() or "is restricted" in error.message()
