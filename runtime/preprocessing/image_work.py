"""Work and memory that the images of a request may take, known from their headers before they are decoded."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence

from runtime.errors import ImageError, InputError
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing.image import DecodingCost, cost_of_file
from runtime.preprocessing.served_limits import SERVED_BYTES, SERVED_PIXELS

__all__ = ["DecodingMemory", "costs_of_files", "name_of_row"]

_MEMORY_BYTES = 320 << 20
"""Memory that decoding may take in a process: of one image, and of all that are decoded at a time.

It suffices for each format at ``SERVED_PIXELS``, but for WebP (20 megapixels), AVIF and TIFF (27), and
progressive JPEG (30); and for transparency where images are converted before they are resized (20)."""

_WORK_OF_SEVERAL = 1 << 26
"""Pixels of work that a request of several images may always take: a second or two. A sender may split it."""

_WORK_PER_BYTE = 16
"""Further pixels of work for each byte of a request's files; photographs take less than half of it."""


class DecodingMemory:
    """Memory of all images that are decoded at a time; threads get theirs in the order that they came."""

    def __init__(self, n_bytes: int = _MEMORY_BYTES) -> None:
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
    places: Sequence[int] | None = None,
) -> list[DecodingCost]:
    """Return what decoding each image of a request takes.

    Args:
        max_bytes: Maximum size of a file.
        max_pixels: Maximum width × height of an image.
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
                f"Image {name_of_row(i, file)} exceeds the limit of {max_bytes} bytes. Make it smaller first."
            )
    costs = [
        _bounded_cost(file, preprocessing, name=name_of_row(i, file), max_pixels=max_pixels)
        for i, file in numbered
    ]
    if len(files) == 1:
        return costs
    n_pixels = sum(cost.n_pixels for cost in costs)
    limit = _WORK_OF_SEVERAL + _WORK_PER_BYTE * sum(map(len, files))
    if n_pixels > limit:
        raise InputError(
            f"The {len(files)} images of the request take {n_pixels} pixels to decode and resize; the "
            f"limit for their size in bytes is {limit}. Send fewer images in a request."
        )
    return costs


def _bounded_cost(
    file: bytes, preprocessing: ImagePreprocessing, *, name: str, max_pixels: int
) -> DecodingCost:
    cost = cost_of_file(file, preprocessing, name=name, max_pixels=max_pixels)
    # Encoders write scans enough for two passes, and _WORK_OF_SEVERAL leaves room for small images.
    if cost.n_pixels > (most := max(2 * max_pixels, _WORK_OF_SEVERAL)):
        raise ImageError(
            f"Image {name} takes {cost.n_pixels} pixels to decode and resize; the limit is {most}. Re-encode "
            "it with fewer scans, or make it smaller first."
        )
    if cost.n_bytes > _MEMORY_BYTES:
        raise ImageError(
            f"Image {name} takes {cost.n_bytes} bytes of memory to decode; the limit is {_MEMORY_BYTES}. "
            "Make it smaller first, or re-encode it as JPEG."
        )
    return cost


def name_of_row(number: int, file: bytes) -> str:
    """Name of an image in errors: its position in the request, and its size."""
    return f"{number} of the request, {len(file)} bytes,"
