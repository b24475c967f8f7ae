"""System shared memory for the images of a request, mapped by client and server."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from runtime.remote.tensors import SharedTensor, bytes_from_strings
from runtime.remote.transport import FailedRequestError, Status, Transport

__all__ = ["SharedRegions"]

_GRANULE_BYTES = 1 << 20
_NOT_ABOUT_MEMORY = (Status.UNAVAILABLE, Status.TIMEOUT, Status.UNTRUSTED)
"""Not among them: a server that denied this client everything did so before."""

_UNKNOWN_REGION = re.compile(r"Unable to find (system )?shared memory region")
"""Triton's words of a request whose region it does not know."""


class SharedRegions:
    """Pool of reusable regions, one per request in flight; use it from one event loop."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._free: list[SharedMemory] = []
        self._known: set[str] = set()

    async def require_accepted(self) -> None:
        """Register a region, so that a server without shared memory is noticed before the first image.

        Raises:
            FailedRequestError: the server refuses it, or cannot map the region.
        """
        region = self._region(_GRANULE_BYTES)
        try:
            await self._register(region)
        finally:
            self._free.append(region)

    @contextlib.asynccontextmanager
    async def holding(self, files: Sequence[bytes]) -> AsyncIterator[SharedTensor]:
        """Hold a BYTES tensor (files, 1) in a region during one request.

        Raises:
            FailedRequestError: the server cannot map the region.
        """
        contents = bytes_from_strings(files)
        region = self._region(len(contents))
        try:
            if region.name not in self._known:
                await self._register(region)
            np.ndarray((len(contents),), np.uint8, buffer=region.buf)[:] = np.frombuffer(contents, np.uint8)
            yield SharedTensor(region.name, len(contents), (len(files), 1))
        finally:
            self._free.append(region)

    def known_failure(self, failure: FailedRequestError) -> FailedRequestError:
        """Return a request's failure; one to repeat if the server was restarted and knows no regions.

        A connection that was idle meanwhile does not show it.
        """
        if not _UNKNOWN_REGION.search(failure.message):
            return failure
        self.forget()
        return FailedRequestError(Status.UNAVAILABLE, failure.message)

    def forget(self) -> None:
        """Forget which regions are registered, since a restarted server knows none."""
        self._known.clear()

    async def close(self) -> None:
        """Release every region that is not held by a request."""
        for region in self._free:
            if region.name in self._known:
                with contextlib.suppress(FailedRequestError):
                    await self._transport.unregister_shared_memory(region.name)
            _release(region)
        self._free.clear()

    async def _register(self, region: SharedMemory) -> None:
        try:
            await self._transport.unregister_shared_memory(region.name)
            await self._transport.register_shared_memory(region.name, f"/{region.name}", region.size)
        except FailedRequestError as failure:
            if failure.status in _NOT_ABOUT_MEMORY:
                raise
            raise FailedRequestError(Status.NO_SHARED_MEMORY, failure.message) from failure
        self._known.add(region.name)

    def _region(self, size_bytes: int) -> SharedMemory:
        for region in self._free:
            if region.size >= size_bytes:
                self._free.remove(region)
                return region
        rounded = -(-size_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        return SharedMemory(f"babeltower-{os.getpid()}-{uuid.uuid4().hex[:12]}", create=True, size=rounded)


def _release(region: SharedMemory) -> None:
    region.close()
    region.unlink()
