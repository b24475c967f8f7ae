"""Pictures as the libraries' own loops open them: lazily, by Pillow."""

from __future__ import annotations

from typing import Any

from PIL import Image

__all__ = ["opened_picture"]


def opened_picture(file: str) -> Any:
    """Open a PNG that was written for this measurement; of other formats none is asked for."""
    return Image.open(file, formats=("PNG",))
