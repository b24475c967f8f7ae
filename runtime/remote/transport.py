"""gRPC and HTTP behind one small interface; every failure becomes a ``FailedRequestError``.

Messages are built and sent here instead of by a client library, since those reconnect silently, and a new
connection may lead to another server.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from runtime.extras import needing
from runtime.remote import options
from runtime.remote.tensors import SharedTensor, Tensor, bytes_from_tensor, datatype_of, pieces_from_tensor

__all__ = [
    "GRPC_OPTIONS",
    "FailedRequestError",
    "GrpcTransport",
    "HttpTransport",
    "ServedModelConfig",
    "ServerAnswer",
    "Status",
    "Transport",
    "channel_options",
    "open_transport",
]

GRPC_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's default reconnect delay grows to two minutes; a restarted server would be noticed late.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Otherwise channels of one process share connections, and one would not notice another's reconnect.
    ("grpc.use_local_subchannel_pool", 1),
)


_INFER = "/inference.GRPCInferenceService/ModelInfer"
_CONTENTS_TAG = bytes([7 << 3 | 2])
"""Tag of ``raw_input_contents``, field 7 of ``ModelInferRequest``, which has a length."""

_PARAMETERS = {"blank": "embed"}
"""Parameters of every request: embed blank texts as in process; by default the server rejects them."""


class Status(Enum):
    """Kind of a failed request; only ``UNAVAILABLE`` is retried.

    ``NO_SHARED_MEMORY`` stands for any refusal of a shared region; the server's own status for it varies.
    """

    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    INVALID_ARGUMENT = "invalid argument"
    NOT_FOUND = "not found"
    REFUSED = "not authorised"
    UNTRUSTED = "certificate not trusted"
    NO_SHARED_MEMORY = "shared memory refused"
    INTERNAL = "internal error"


class FailedRequestError(Exception):
    """A failed request; internal to ``runtime.remote``."""

    def __init__(self, status: Status, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(f"{status.value}: {message}")


@dataclass(frozen=True, slots=True)
class ServedModelConfig:
    """Used fields of a model's configuration."""

    parameters: Mapping[str, str]
    max_batch_size: int
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """Output ``vector`` of a request, and the model version that answered."""

    vector: NDArray[Any]
    version: str


class Transport(Protocol):
    """Connection to one server; use it from one event loop."""

    @property
    def generation(self) -> int:
        """Counter of replaced connections, after which the server may be another one."""

    async def config(self, model: str) -> ServedModelConfig:
        """Return a model's configuration."""

    async def infer(self, model: str, inputs: Mapping[str, Tensor], *, version: str = "") -> ServerAnswer:
        """Request the output ``vector`` of a model."""

    async def register_shared_memory(self, region: str, key: str, size_bytes: int) -> None:
        """Register a region with the server."""

    async def unregister_shared_memory(self, region: str) -> None:
        """Unregister a region, if the server knows it."""

    async def close(self) -> None:
        """Close the connection."""


def channel_options(address: options.Address) -> list[tuple[str, int]]:
    """Options of a gRPC channel; a server on this machine is never reached through a proxy."""
    return [*GRPC_OPTIONS, *([("grpc.enable_http_proxy", 0)] if address.is_loopback else [])]


def open_transport(address: options.Address, connection: options.Connection) -> Transport:
    """Create the transport of an address, on the event loop that will use it; nothing is sent yet.

    Raises:
        EngineError: the client libraries are not installed.
    """
    with needing(f"{address.protocol.value}://", "babeltower[client]"):
        if address.protocol is options.WireProtocol.GRPC:
            return GrpcTransport(address, connection)
        return HttpTransport(address, connection)


class GrpcTransport:
    """KServe v2 over gRPC."""

    def __init__(self, address: options.Address, connection: options.Connection) -> None:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self._messages = service_pb2
        self._timeout_s = connection.timeout_s
        self._metadata = tuple(connection.all_headers(address.protocol).items())
        if address.tls:
            ca, key, chain = (
                None if path is None else Path(path).read_bytes()
                for path in (connection.ca_file, connection.key_file, connection.certificate_file)
            )
            credentials = grpc.ssl_channel_credentials(ca, key, chain)
            channel = grpc.aio.secure_channel(address.target, credentials, options=channel_options(address))
        else:
            channel = grpc.aio.insecure_channel(address.target, options=channel_options(address))
        self._channel = channel
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._infer = self._channel.unary_unary(
            _INFER, response_deserializer=service_pb2.ModelInferResponse.FromString
        )
        self._generation = 0
        self._watching = asyncio.ensure_future(self._watch())

    @property
    def generation(self) -> int:
        """See ``Transport``."""
        return self._generation

    async def config(self, model: str) -> ServedModelConfig:
        """See ``Transport``."""
        request = self._messages.ModelConfigRequest(name=model)
        config = (await self._call(self._stub.ModelConfig, request)).config
        datatype = config.DESCRIPTOR.fields_by_name["output"].message_type.fields_by_name["data_type"]
        names = datatype.enum_type.values_by_number
        return ServedModelConfig(
            parameters={key: value.string_value for key, value in config.parameters.items()},
            max_batch_size=config.max_batch_size,
            outputs={output.name: names[output.data_type].name for output in config.output},
        )

    async def infer(self, model: str, inputs: Mapping[str, Tensor], *, version: str = "") -> ServerAnswer:
        """See ``Transport``."""
        request = self._messages.ModelInferRequest(model_name=model, model_version=version)
        for key, value in _PARAMETERS.items():
            request.parameters[key].string_param = value
        pieces: list[bytes] = []
        for name, tensor in inputs.items():
            given = request.inputs.add(name=name, datatype=datatype_of(tensor), shape=tensor.shape)
            if isinstance(tensor, SharedTensor):
                given.parameters["shared_memory_region"].string_param = tensor.region
                given.parameters["shared_memory_byte_size"].int64_param = tensor.size_bytes
            else:
                pieces += _field_of_contents(tensor)
        # The message's fields may follow each other: a large one is copied once, not once a step.
        message = b"".join([request.SerializeToString(), *pieces])
        response = await self._call(self._infer, message)
        for output, contents in zip(response.outputs, response.raw_output_contents, strict=False):
            if output.name == "vector":
                vector = _array(contents, output.datatype, tuple(output.shape))
                return ServerAnswer(vector, response.model_version)
        raise FailedRequestError(Status.INTERNAL, "the answer has no output 'vector'")

    async def register_shared_memory(self, region: str, key: str, size_bytes: int) -> None:
        """See ``Transport``."""
        request = self._messages.SystemSharedMemoryRegisterRequest(name=region, key=key, byte_size=size_bytes)
        await self._call(self._stub.SystemSharedMemoryRegister, request)

    async def unregister_shared_memory(self, region: str) -> None:
        """See ``Transport``."""
        request = self._messages.SystemSharedMemoryUnregisterRequest(name=region)
        await self._call(self._stub.SystemSharedMemoryUnregister, request)

    async def close(self) -> None:
        """See ``Transport``."""
        self._watching.cancel()
        await self._channel.close()

    async def _watch(self) -> None:
        import grpc

        state = self._channel.get_state()
        while state is not grpc.ChannelConnectivity.SHUTDOWN:
            await self._channel.wait_for_state_change(state)
            if state is grpc.ChannelConnectivity.READY:
                self._generation += 1
            state = self._channel.get_state()

    async def _call(self, method: Callable[..., Any], request: Any) -> Any:
        import grpc

        try:
            return await method(request, metadata=self._metadata, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise FailedRequestError(_grpc_status(error), error.details() or error.code().name) from error


def _field_of_contents(tensor: NDArray[Any]) -> list[bytes]:
    """Return a tensor as the pieces of a field ``raw_input_contents`` of a ``ModelInferRequest``."""
    pieces = pieces_from_tensor(tensor)
    n_bytes, length = sum(map(len, pieces)), bytearray()
    while n_bytes > 0x7F:
        length.append(n_bytes & 0x7F | 0x80)
        n_bytes >>= 7
    length.append(n_bytes)
    return [_CONTENTS_TAG, bytes(length), *pieces]


def _grpc_status(error: Any) -> Status:
    """Map a gRPC error to a status.

    Certificate errors are UNAVAILABLE in gRPC, and a missing token in Triton; retries help neither.
    """
    details = error.details() or ""
    if error.code().name == "UNAVAILABLE":
        if any(word in details for word in _GRPC_UNTRUSTED):
            return Status.UNTRUSTED
        if details.startswith(_GRPC_RESTRICTED):
            return Status.REFUSED
    if error.code().name == "RESOURCE_EXHAUSTED" and _GRPC_TOO_LARGE in details:
        return Status.INVALID_ARGUMENT
    return _unless_passing(_GRPC_STATUSES.get(error.code().name, Status.INTERNAL), details)


def _unless_passing(status: Status, message: str) -> Status:
    """Return the status of a failure, ``UNAVAILABLE`` if its words say that it passes by itself.

    Triton has one code for a model that it does not know and one that is being loaded, and another for a bug
    and a server that stops.
    """
    if status in (Status.INTERNAL, Status.NOT_FOUND) and any(words in message for words in _PASSING):
        return Status.UNAVAILABLE
    return status


_PASSING = (
    "Server not ready",
    "Server is stopping",
    "has no available versions",
    "is not ready",
    "is not healthy",
)


_GRPC_UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")
_GRPC_RESTRICTED = "This protocol is restricted"
_GRPC_TOO_LARGE = "larger than max"
_GRPC_STATUSES = {
    "UNAVAILABLE": Status.UNAVAILABLE,
    "RESOURCE_EXHAUSTED": Status.UNAVAILABLE,  # of a guard that answers too many
    "CANCELLED": Status.UNAVAILABLE,  # by a stopping server; the client's own are ignored
    "DEADLINE_EXCEEDED": Status.TIMEOUT,
    "INVALID_ARGUMENT": Status.INVALID_ARGUMENT,
    "NOT_FOUND": Status.NOT_FOUND,
    "UNAUTHENTICATED": Status.REFUSED,
    "PERMISSION_DENIED": Status.REFUSED,
}


class HttpTransport:
    """KServe v2 over HTTP, tensors in binary."""

    def __init__(self, address: options.Address, connection: options.Connection) -> None:
        import aiohttp

        self._url = f"{'https' if address.tls else 'http'}://{address.target}/v2"
        self._timeout_s = connection.timeout_s
        self._generation = 0
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(self._connected)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=connection.concurrency + 1, ssl=_ssl_context(connection) if address.tls else True
            ),
            headers=connection.all_headers(address.protocol),
            timeout=aiohttp.ClientTimeout(total=connection.timeout_s),
            trace_configs=[trace],
            trust_env=False,
        )

    @property
    def generation(self) -> int:
        """See ``Transport``; new pool connections count too, since a balancer may pick another server."""
        return self._generation

    async def config(self, model: str) -> ServedModelConfig:
        """See ``Transport``."""
        config = json.loads((await self._call("GET", f"models/{quote(model)}/config"))[0])
        return ServedModelConfig(
            parameters={k: v.get("string_value", "") for k, v in config.get("parameters", {}).items()},
            max_batch_size=config.get("max_batch_size", 0),
            outputs={output["name"]: output["data_type"] for output in config.get("output", [])},
        )

    async def infer(self, model: str, inputs: Mapping[str, Tensor], *, version: str = "") -> ServerAnswer:
        """See ``Transport``."""
        described, contents = [], []
        for name, tensor in inputs.items():
            if isinstance(tensor, SharedTensor):
                parameters: dict[str, Any] = {
                    "shared_memory_region": tensor.region,
                    "shared_memory_byte_size": tensor.size_bytes,
                }
            else:
                contents.append(bytes_from_tensor(tensor))
                parameters = {"binary_data_size": len(contents[-1])}
            described.append(
                {
                    "name": name,
                    "datatype": datatype_of(tensor),
                    "shape": list(tensor.shape),
                    "parameters": parameters,
                }
            )
        wanted = [{"name": "vector", "parameters": {"binary_data": True}}]
        request = {"inputs": described, "outputs": wanted, "parameters": _PARAMETERS}
        head = json.dumps(request).encode()
        path = f"models/{quote(model)}{f'/versions/{version}' if version else ''}/infer"
        answer, n_head = await self._call("POST", path, b"".join([head, *contents]), len(head))
        return _answer_from_body(answer, n_head)

    async def register_shared_memory(self, region: str, key: str, size_bytes: int) -> None:
        """See ``Transport``."""
        body = json.dumps({"key": key, "offset": 0, "byte_size": size_bytes}).encode()
        await self._call("POST", f"systemsharedmemory/region/{quote(region)}/register", body)

    async def unregister_shared_memory(self, region: str) -> None:
        """See ``Transport``."""
        await self._call("POST", f"systemsharedmemory/region/{quote(region)}/unregister")

    async def close(self) -> None:
        """See ``Transport``."""
        await self._session.close()

    async def _connected(self, *_: Any) -> None:
        self._generation += 1

    async def _call(
        self, method: str, path: str, body: bytes | None = None, n_head: int | None = None
    ) -> tuple[bytes, int | None]:
        """Send a request; return the answer's body and the length of its JSON header, if not all of it."""
        import aiohttp

        headers = {} if n_head is None else {"Inference-Header-Content-Length": str(n_head)}
        try:
            async with self._session.request(
                method, f"{self._url}/{path}", data=body, headers=headers, allow_redirects=False
            ) as response:
                answer = await response.read()
                head = response.headers.get("Inference-Header-Content-Length")
                status = response.status
        except asyncio.TimeoutError as error:
            raise FailedRequestError(Status.TIMEOUT, f"no answer within {self._timeout_s} s") from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise FailedRequestError(Status.UNTRUSTED, str(error)) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            raise FailedRequestError(Status.UNAVAILABLE, str(error) or type(error).__name__) from error
        except aiohttp.ClientError as error:
            raise FailedRequestError(Status.INTERNAL, str(error) or type(error).__name__) from error
        if status != 200:
            reason = _reason(status, answer)
            found = _HTTP_STATUSES.get(status, Status.INTERNAL)
            raise FailedRequestError(_unless_passing(found, reason), reason)
        return answer, None if head is None else int(head)


_HTTP_STATUSES = {
    400: Status.INVALID_ARGUMENT,
    401: Status.REFUSED,
    403: Status.REFUSED,
    404: Status.NOT_FOUND,
    413: Status.INVALID_ARGUMENT,
    502: Status.UNAVAILABLE,
    503: Status.UNAVAILABLE,
    504: Status.TIMEOUT,
}


def _reason(status: int, answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}" + (f", {answer[:200].decode(errors='replace').strip()}" if answer else "")


def _answer_from_body(body: bytes, n_head: int | None) -> ServerAnswer:
    try:
        head = json.loads(body if n_head is None else body[:n_head])
        (output,) = (output for output in head["outputs"] if output["name"] == "vector")
        size_bytes = output["parameters"]["binary_data_size"]
        contents = body[len(body) if n_head is None else n_head :][:size_bytes]
        vector = _array(contents, output["datatype"], tuple(output["shape"]))
    except (ValueError, KeyError, TypeError) as error:
        raise FailedRequestError(
            Status.INTERNAL, f"the answer violates the protocol ({type(error).__name__}: {error})"
        ) from error
    return ServerAnswer(vector, str(head.get("model_version", "")))


def _array(contents: bytes, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if datatype != "FP32":
        raise FailedRequestError(Status.INTERNAL, f"'vector' is of type {datatype}; expected FP32")
    if len(contents) != 4 * int(np.prod(shape)):
        raise FailedRequestError(Status.INTERNAL, f"'vector' has {len(contents)} bytes for shape {shape}")
    return np.frombuffer(contents, dtype="<f4").reshape(shape)


def _ssl_context(connection: options.Connection) -> ssl.SSLContext:
    context = ssl.create_default_context(
        cafile=None if connection.ca_file is None else str(connection.ca_file)
    )
    if connection.certificate_file is not None and connection.key_file is not None:
        context.load_cert_chain(str(connection.certificate_file), str(connection.key_file))
    return context
