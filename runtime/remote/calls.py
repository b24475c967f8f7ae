"""Single requests: retried while the server is unavailable, with a space check after reconnecting."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BabeltowerError, EngineError, ServerError, error_from_message
from runtime.logs import LOGGER
from runtime.manifest import Modality, front_end_name
from runtime.remote.options import Connection
from runtime.remote.payloads import RequestRows, concatenated
from runtime.remote.served_model import (
    FrontEndsDifferError,
    ServedModel,
    require_served_model,
    served_model_from_transport,
)
from runtime.remote.shared import SharedRegions
from runtime.remote.tensors import Tensor
from runtime.remote.transport import FailedRequestError, ServerAnswer, Status, Transport

__all__ = ["Caller", "NoAnswerError", "delays_s", "event_loop"]

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0


class NoAnswerError(ServerError):
    """A request got no answer, but a retry may succeed."""


def delays_s(random_unit: random.Random) -> Iterator[float]:
    """Yield endless back-off delays in seconds: 0.05, doubled up to 2, each randomly cut by up to half."""
    delay = _FIRST_DELAY_S
    while True:
        yield delay * (1 - random_unit.random() / 2)
        delay = min(2 * delay, _LONGEST_DELAY_S)


class Caller:
    """Sender of requests to one model on one server; runs on the event loop."""

    def __init__(self, transport: Transport, connection: Connection, address: str) -> None:
        self._transport = transport
        self._connection = connection
        self._address = address
        self._slots = asyncio.Semaphore(connection.concurrency)
        self._regions = SharedRegions(transport) if connection.shared_memory else None
        self._served: ServedModel | None = None
        self._versions: dict[str, str] = {}
        self._sure_of: int | None = None  # connection generation whose server's space was checked
        self._checking = asyncio.Lock()
        self._random = random.Random()
        self._away_since: float | None = None

    async def open(self, name: str) -> ServedModel:
        """Read the served model, without retries, so that opening fails fast.

        Raises:
            ServerError: the server cannot be reached, does not serve the model, or takes no shared memory.
        """
        try:
            self._served = await served_model_from_transport(self._transport, name)
            if self._regions is not None:
                await self._regions.require_accepted()
            self._sure_of = self._transport.generation
        except FailedRequestError as failure:
            raise _error_of_failure(failure, self._address) from failure
        return self._served

    async def vectors(self, rows: RequestRows, *, dim: int) -> NDArray[np.float32]:
        """Embed the rows of a request.

        Returns:
            float32 (rows, dim), in order.

        Raises:
            InputError: the server rejects a row; the message names its position.
            NoAnswerError: the server was unavailable for too long, or timed out.
            ServerError: it failed, or now serves another embedding space.
        """
        async with self._slots:
            waits = delays_s(self._random)
            give_up_at: float | None = None
            while True:
                try:
                    await self._require_same_space()
                    vectors = await self._answer(rows, dim)
                except FailedRequestError as failure:
                    if failure.status is Status.INVALID_ARGUMENT and len(rows) > 1:
                        break
                    if failure.status is not Status.UNAVAILABLE:
                        raise _error_of_failure(failure, self._address, rows) from failure
                    self._doubt()
                    wait = next(waits)
                    now = time.monotonic()
                    give_up_at = now + self._connection.retry_for_s if give_up_at is None else give_up_at
                    if now + wait > give_up_at:
                        raise _error_of_failure(failure, self._address, rows) from failure
                    self._tell_outage(failure)
                    await asyncio.sleep(wait)
                else:
                    self._tell_recovery()
                    return vectors
        # The server names no row of a request: each is asked alone, the first that is refused is named.
        return concatenated([await self.vectors(row, dim=dim) for row in rows.alone()], dim)

    async def close(self) -> None:
        """Close the connection."""
        if self._regions is not None:
            await self._regions.close()
        await self._transport.close()

    async def _answer(self, rows: RequestRows, dim: int) -> NDArray[np.float32]:
        served = self._known()
        model = front_end_name(served.name, rows.modality)
        inputs: dict[str, Tensor] = {**rows.tensors(dim=None if dim == served.dims[-1] else dim)}
        if self._regions is not None and rows.modality is Modality.IMAGE:
            async with self._regions.holding(rows.columns["image"]) as images:
                try:
                    answer = await self._transport.infer(model, {**inputs, "image": images})
                except FailedRequestError as failure:
                    raise self._regions.known_failure(failure) from failure
        else:
            answer = await self._transport.infer(model, inputs)
        await self._require_same_release(model, answer)
        return _checked(answer.vector, model, (len(rows), dim))

    async def _require_same_release(self, model: str, answer: ServerAnswer) -> None:
        """Check that the answering server and version are of the same space."""
        if self._versions.setdefault(model, answer.version) != answer.version:
            LOGGER.info(
                "%s: %s answers with version %s, before with %s",
                self._address,
                model,
                answer.version,
                self._versions[model],
            )
            self._versions[model] = answer.version
            self._doubt()
        await self._require_same_space()

    def _tell_outage(self, failure: FailedRequestError) -> None:
        """Log the first failure of an outage; every request in flight meets it."""
        if self._away_since is None:
            self._away_since = time.monotonic()
            LOGGER.warning(
                "%s is not available (%s); requests are repeated for up to %g s",
                self._address,
                failure.message.rstrip(". \n"),
                self._connection.retry_for_s,
            )

    def _tell_recovery(self) -> None:
        if self._away_since is not None:
            LOGGER.info("%s answers again after %.1f s", self._address, time.monotonic() - self._away_since)
            self._away_since = None

    def _doubt(self) -> None:
        self._sure_of = None
        if self._regions is not None:
            self._regions.forget()

    async def _require_same_space(self) -> None:
        while self._sure_of != self._transport.generation:
            async with self._checking:
                generation = self._transport.generation
                if self._sure_of != generation:
                    self._doubt()
                    await self._check_space()
                    self._sure_of = generation

    async def _check_space(self) -> None:
        known = self._known()
        try:
            found = await served_model_from_transport(self._transport, known.name)
        except FrontEndsDifferError as error:  # a rollout switches one after the other
            raise FailedRequestError(Status.UNAVAILABLE, str(error)) from error
        require_served_model(found, engine=None, precision=None, fingerprint=known.fingerprint)
        if found.dims != known.dims:
            raise ServerError(
                f"{self._address} had widths {list(known.dims)} and now has {list(found.dims)}: it "
                "serves another release. Open it again."
            )
        self._served = found

    def _known(self) -> ServedModel:
        if self._served is None:
            raise EngineError("The caller is not open; call open() first.")
        return self._served


def _checked(vector: NDArray[Any], model: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    if vector.dtype != np.float32 or vector.shape != shape:
        raise ServerError(
            f"{model} answered {vector.dtype} {vector.shape}; expected float32 {shape}. The server does not "
            "match its repository: export the checkpoint again."
        )
    if not np.isfinite(vector).all():
        raise ServerError(f"{model} answered non-finite numbers. Serve another precision.")
    return vector


def _error_of_failure(
    failure: FailedRequestError, address: str, rows: RequestRows | None = None
) -> BabeltowerError:
    message = failure.message.rstrip()
    match failure.status:
        case Status.INVALID_ARGUMENT if rows is not None:
            return error_from_message(message, place=f"{rows.modality.value.capitalize()} {rows.places[0]}")
        case Status.UNAVAILABLE:
            return NoAnswerError(f"{address} is not available: {message.rstrip('.')}.")
        case Status.TIMEOUT:
            return NoAnswerError(f"{address} timed out: {message.rstrip('.')}.")
        case Status.NOT_FOUND:
            return ServerError(
                f"{address} does not serve this model: {message.rstrip('.')}. Use the name of a manifest in "
                "the server's repository, not of a tower."
            )
        case Status.UNTRUSTED:
            return ServerError(
                f"The certificate of {address} cannot be verified: {message.rstrip('.')}. Pass its CA as "
                "Connection(ca_file=...); the certificate must be issued for this host."
            )
        case Status.NO_SHARED_MEMORY:
            return ServerError(
                f"{address} does not take shared memory: {message.rstrip('.')}. Start it with `babeltower "
                "serve --shared-memory`. From release 26.04 on, Triton needs --allow-client-shm=true, and a "
                "container the /dev/shm of this machine (`babeltower serve --target gpu --shared-memory "
                "--write FOLDER` writes both); or leave shared_memory=False."
            )
        case Status.REFUSED:
            return ServerError(
                f"{address} denies access: {message.rstrip('.')}. Pass Connection(token=...), or to a "
                "command --token-file."
            )
    return ServerError(f"{address} failed: {message.rstrip('.')}.")


_loop_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the process's event loop for remote calls, on its own thread.

    All encoders share it, since gRPC's asyncio wakes every loop of a process for every answer.
    """
    with _loop_lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="babeltower-remote", daemon=True).start()
            _loops[os.getpid()] = loop
        return loop
