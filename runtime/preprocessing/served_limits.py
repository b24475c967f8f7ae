"""Largest text and image that a server takes by default, for the front ends and the gateway before them."""

from __future__ import annotations

__all__ = [
    "REQUEST_MEMORY_VARIABLE",
    "SERVED_BYTES",
    "SERVED_CHARACTERS",
    "SERVED_MEMORY_BYTES",
    "SERVED_PIXELS",
    "largest_file_bytes",
]

REQUEST_MEMORY_VARIABLE = "BABELTOWER_REQUEST_MEMORY"
"""Environment variable by which `serve` gives ``--request-memory``, in megabytes, to the front ends."""

SERVED_CHARACTERS = 16_384
"""Maximum characters of a text."""

SERVED_PIXELS = 1 << 25
"""Maximum width × height of an image: 33 megapixels, which are decoded in a second or less."""

SERVED_MEMORY_BYTES = 64_000_000
"""Maximum memory that a request takes in all processes of a server: its files, and decoding them."""

_FILE_PART = 10
"""A request is in memory seven times: in the gateway, in Triton, and in the front end's process."""


def largest_file_bytes(memory_bytes: int) -> int:
    """Return the maximum size of an image's file, and of all files of a request, by its memory."""
    return memory_bytes // _FILE_PART


SERVED_BYTES = largest_file_bytes(SERVED_MEMORY_BYTES)
"""Maximum size of an image's file: 6.4 MB."""
