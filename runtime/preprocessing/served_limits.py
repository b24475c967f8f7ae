"""Largest text and image that a server takes by default, for the front ends and the gateway before them."""

from __future__ import annotations

__all__ = ["SERVED_BYTES", "SERVED_CHARACTERS", "SERVED_PIXELS"]

SERVED_CHARACTERS = 16_384
"""Maximum characters of a text."""

SERVED_BYTES = 32 << 20
"""Maximum size of an image's file."""

SERVED_PIXELS = 1 << 25
"""Maximum width × height of an image: 33 megapixels, which are decoded in a second or less."""
