"""HTTP of the gateway: uvicorn's, with bounds on heads, on idle connections and on their number."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BoundedHttp"]

_MOST_HEAD_BYTES = 64 << 10
_HEAD_S = 10.0
_WRITE_S = 60.0
_LINGER_S = 2.0
_MOST_PIPELINED = 64
_EVICTED_PART = 32
"""One connection in so many is closed when there are too many; each search looks at all of them."""

_TOO_LARGE = "431 Request Header Fields Too Large", "The request line and the headers exceed 64 KiB."
_NOT_VALID = "400 Bad Request", "This is not a valid HTTP request."


class BoundedHttp(HttpToolsProtocol):
    """Connection that ends if a head is over 64 KiB or takes over 10 s, or its client does not read.

    The parser collects a head of any size, and joins a long header in quadratic time; a connection without a
    whole request would stay open for ever. Of more than ``limit_concurrency`` connections, those that have
    waited longest are closed, first of the address that has most of them: a client that opens thousands
    closes its own.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most_connections = self.limit_concurrency
        self.limit_concurrency = None  # of which uvicorn answers 503 to everybody
        self._is_in_head = self._is_in_body = self._is_ended = self._is_too_large = False
        self._head_bytes = self._bytes_without_progress = 0
        self._has_progress = False
        self._running: Any = None  # uvicorn's cycle of a request; its own attribute is the newest one's
        self._ending: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self.waits_since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head; close other connections if there are too many."""
        super().connection_made(transport)
        self._wait(_HEAD_S)
        if self._most_connections is not None and len(self.connections) > self._most_connections:
            others: Any = self.connections - {self}
            for victim in _longest_waiting(others, max(1, self._most_connections // _EVICTED_PART)):
                self.connections.discard(victim)
                victim.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._stop_waiting()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse what was received; count what neither begins a request nor is of a body."""
        if self._is_ended:
            return
        self._has_progress = False
        super().data_received(data)
        self._bytes_without_progress = 0 if self._has_progress else self._bytes_without_progress + len(data)
        if self._bytes_without_progress > _MOST_HEAD_BYTES:
            self._end(*_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed."""
        self._end(*(_TOO_LARGE if self._is_too_large else _NOT_VALID))

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._is_in_head = self._has_progress = True
        self._head_bytes = 0
        if not self._is_answering():
            self._wait(_HEAD_S)

    def on_url(self, url: bytes) -> None:
        """Keep a part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; a trailer, which nobody reads, is only counted."""
        self._count(len(name) + len(value) + 4)
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End a head."""
        self._is_in_head, self._is_in_body, self._has_progress = False, True, True
        self._stop_waiting()
        self.waits_since = self.loop.time()
        n_pipelined = len(self.pipeline)
        super().on_headers_complete()
        if len(self.pipeline) == n_pipelined:
            self._running = self.cycle
        if len(self.pipeline) > _MOST_PIPELINED:
            self._is_ended = True
            self.abort()

    def on_body(self, body: bytes) -> None:
        """Keep a part of a body."""
        self._has_progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._is_in_body = False
        super().on_message_complete()
        if not self._is_answering():  # it was refused before all of it was here
            self._wait(self.timeout_keep_alive)

    def on_response_complete(self) -> None:
        """Wait for the next head, or for the rest of a request that was refused; both have a time."""
        self._running = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if not self._is_ended and not self.transport.is_closing() and not self._is_answering():
            is_idle = not (self._is_in_head or self._is_in_body)
            self._wait(self.timeout_keep_alive if is_idle else _HEAD_S)

    def pause_writing(self) -> None:
        """Wait for a client that does not read."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(_WRITE_S, self.abort)

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    @property
    def is_waiting(self) -> bool:
        """Whether the connection waits for its client, and no request is being answered."""
        return not self._is_answering() or (self.cycle.more_body and not self.pipeline)

    def abort(self) -> None:
        """End the connection at once; what is being answered is answered to nobody."""
        self._leave_cycle()
        self.transport.abort()

    def _leave_cycle(self) -> None:
        """Tell the request that is being received or answered that its sender is gone."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def _is_answering(self) -> bool:
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    def _count(self, n_bytes: int) -> None:
        self._head_bytes += n_bytes
        if self._head_bytes > _MOST_HEAD_BYTES:
            self._is_too_large = True
            raise ValueError(_TOO_LARGE[1])  # ends the parsing: see send_400_response

    def _end(self, status: str, message: str) -> None:
        """Answer, then drop what arrives until the client closes: an early close would lose the answer."""
        if self._is_ended:
            return
        self._is_ended = True
        self._stop_waiting()
        if self._is_answering():
            if (
                not self.is_waiting or self.cycle.response_started
            ):  # this would be an earlier request's answer
                self.abort()
                return
            self._leave_cycle()
        self.transport.write(
            f"HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\n"
            f"content-length: {len(message)}\r\nconnection: close\r\n\r\n{message}".encode()
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._ending = self.loop.call_later(_LINGER_S, self.transport.abort)

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self.waits_since = self.loop.time()
        self._ending = self.loop.call_later(seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def _give_up(self) -> None:
        self._ending = None
        if self._is_answering():
            return
        if self._is_in_head or self._is_in_body or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()


def _longest_waiting(connections: Iterable[BoundedHttp], n_connections: int) -> list[BoundedHttp]:
    waiting = [connection for connection in connections if connection.is_waiting]
    n_of_address = Counter(_address(connection) for connection in waiting)
    waiting.sort(key=lambda connection: (-n_of_address[_address(connection)], connection.waits_since))
    return waiting[:n_connections]


def _address(connection: BoundedHttp) -> str:
    return connection.client[0] if connection.client else ""
