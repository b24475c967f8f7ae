"""HTTP of the gateway: uvicorn's, with limits on the size of a request's head and on the time for it."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BoundedHttp"]

_MOST_HEAD_BYTES = 64 << 10
_HEAD_S = 30.0
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHttp(HttpToolsProtocol):
    """Connection that is closed if a head is over 64 KiB, or is not there within 30 s.

    The parser collects a head of any size, and a connection without a whole request would stay open for ever.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_in_head = False
        self._n_begun = 0
        self._head_bytes = 0
        self._giving_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._stop_waiting()

    def data_received(self, data: bytes) -> None:
        """Parse what was received, and count what is of an unfinished head."""
        was_in_head, n_begun = self._is_in_head, self._n_begun
        super().data_received(data)
        if not self._is_in_head or self.transport.is_closing():
            return
        if self._giving_up is None:
            self._wait_for_head()
        if was_in_head and self._n_begun == n_begun:
            self._count(len(data))

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._is_in_head, self._head_bytes = True, 0
        self._n_begun += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, or count a trailer, which nobody reads."""
        if self._is_in_head:
            super().on_header(name, value)
        else:
            self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """End a head."""
        self._is_in_head, self._head_bytes = False, 0
        self._stop_waiting()
        super().on_headers_complete()

    def _count(self, n_bytes: int) -> None:
        self._head_bytes += n_bytes
        if self._head_bytes > _MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def _wait_for_head(self) -> None:
        self._giving_up = self.loop.call_later(_HEAD_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def _give_up(self) -> None:
        self._giving_up = None
        self.transport.close()
