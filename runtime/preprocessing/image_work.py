"""Work and memory that the images of a request may take, known from their headers before they are decoded."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence

from runtime.errors import ImageError, InputError
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing.image import DecodingCost, cost_of_file
from runtime.preprocessing.served_limits import SERVED_BYTES, SERVED_MEMORY_BYTES, SERVED_PIXELS

__all__ = ["DecodingMemory", "costs_of_files", "name_of_row"]

_COPIES = 7
"""How often a file is in memory, in all processes of a server, while it is decoded: measured."""

_FIXED_BYTES = 6_000_000
"""Memory that decoders take whatever an image's size is."""

_AT_A_TIME = 4
"""A request's memory ÷ the memory of what is decoded at a time."""

_WORK_OF_SEVERAL = 1 << 26
"""Pixels of work that a request of several images may always take: a second or two. A sender may split it."""

_WORK_PER_BYTE = 16
"""Further pixels of work for each byte of a request's files; photographs take less than half of it."""


class DecodingMemory:
    """Memory of all images that are decoded at a time; threads get theirs in the order that they came.

    It is a part of what a request may take: a large image is decoded alone, small ones several at a time.
    """

    def __init__(self, request_bytes: int = SERVED_MEMORY_BYTES) -> None:
        n_bytes = request_bytes // _AT_A_TIME
        self._n_bytes = self._n_free = n_bytes
        self._turns: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, n_bytes: int) -> Iterator[None]:
        """Hold memory within the block, all of it at most."""
        n_bytes, turn = min(n_bytes, self._n_bytes), object()
        with self._changed:
            self._turns.append(turn)
            self._changed.wait_for(lambda: self._turns[0] is turn and n_bytes <= self._n_free)
            self._turns.popleft()
            self._n_free -= n_bytes
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._n_free += n_bytes
                self._changed.notify_all()


def costs_of_files(
    files: Sequence[bytes],
    preprocessing: ImagePreprocessing,
    *,
    max_bytes: int = SERVED_BYTES,
    max_pixels: int = SERVED_PIXELS,
    max_memory_bytes: int = SERVED_MEMORY_BYTES,
    places: Sequence[int] | None = None,
) -> list[DecodingCost]:
    """Return what decoding each image of a request takes.

    Args:
        max_bytes: Maximum size of a file.
        max_pixels: Maximum width × height of an image.
        max_memory_bytes: Maximum memory of the request: its files, and to decode an image.
        places: Position of each image in the request, for errors; default: its position here.

    Raises:
        ImageError: an image is too large, or of a format that is not supported, or its header is damaged; or
            it takes too much time or memory.
        InputError: all images together take too much work for their size in bytes.
    """
    numbered = list(zip(range(len(files)) if places is None else places, files, strict=True))
    for i, file in numbered:
        if len(file) > max_bytes:
            raise ImageError(
                f"Image {name_of_row(i, file)} exceeds the limit of {max_bytes} bytes. Make it smaller, or "
                "start `babeltower serve` with a larger --request-memory."
            )
    n_file_bytes = sum(map(len, files))
    costs = [
        _bounded_cost(
            file,
            preprocessing,
            name=name_of_row(i, file),
            max_pixels=max_pixels,
            max_bytes=max_memory_bytes - _FIXED_BYTES - _COPIES * n_file_bytes,
        )
        for i, file in numbered
    ]
    if len(files) == 1:
        return costs
    n_pixels = sum(cost.n_pixels for cost in costs)
    limit = _WORK_OF_SEVERAL + _WORK_PER_BYTE * n_file_bytes
    if n_pixels > limit:
        raise InputError(
            f"The {len(files)} images of the request take {n_pixels} pixels to decode and resize; the "
            f"limit for their size in bytes is {limit}. Send fewer images in a request."
        )
    return costs


def _bounded_cost(
    file: bytes, preprocessing: ImagePreprocessing, *, name: str, max_pixels: int, max_bytes: int
) -> DecodingCost:
    cost = cost_of_file(file, preprocessing, name=name, max_pixels=max_pixels)
    # Encoders write scans enough for two passes, and _WORK_OF_SEVERAL leaves room for small images.
    if cost.n_pixels > (most := max(2 * max_pixels, _WORK_OF_SEVERAL)):
        raise ImageError(
            f"Image {name} takes {cost.n_pixels} pixels to decode and resize; the limit is {most}. Re-encode "
            "it with fewer scans, or make it smaller first."
        )
    if cost.n_bytes > max_bytes:
        raise ImageError(
            f"Image {name} takes {cost.n_bytes} bytes of memory to decode; the limit is {max(0, max_bytes)}. "
            "Make it smaller, re-encode it as JPEG that is not progressive, or send it alone; or start "
            "`babeltower serve` with a larger --request-memory."
        )
    return cost


def name_of_row(number: int, file: bytes) -> str:
    """Name of an image in errors: its position in the request, and its size."""
    return f"{number} of the request, {len(file)} bytes,"
