"""Pictures opened as in the libraries' own loops: lazily, by Pillow."""

from __future__ import annotations

from typing import Any

from PIL import Image

__all__ = ["opened_picture"]


def opened_picture(file: str) -> Any:
    """Open a PNG that was written for this measurement; other formats do not occur."""
    return Image.open(file, formats=("PNG",))
