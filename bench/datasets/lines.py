"""Text files whose lines must match a list of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.errors import DatasetError

__all__ = ["json_from_text", "lines_of", "require_length", "text_of"]


def text_of(path: Path, layout: str) -> str:
    """Return the text of a UTF-8 file.

    Args:
        layout: The expected layout, quoted in errors.

    Raises:
        DatasetError: the file is missing or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing. Expected layout:\n{layout}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def lines_of(path: Path, layout: str) -> list[str]:
    """Return lines, split only at newlines: ``splitlines`` would split at U+2028, which captions may have.

    Raises:
        DatasetError: the file is missing, is not UTF-8, or has an empty line.
    """
    text = text_of(path, layout).replace("\r\n", "\n").removesuffix("\n")
    lines = text.split("\n") if text else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DatasetError(
                f"{path}, line {number} is empty; every line belongs to an image. "
                "Fetch the file again, or write the missing caption."
            )
    return lines


def require_length(path: Path, found: int, expected: int, per: Path) -> None:
    """Refuse a caption file whose number of lines differs from the number of images.

    Raises:
        DatasetError: the counts differ.
    """
    if found != expected:
        raise DatasetError(
            f"{path} has {found} lines; {per} lists {expected} images, one line each. "
            "A cut or shifted file scores captions against the wrong images: fetch it again."
        )


def json_from_text(text: str, origin: str) -> Any:
    """Decode JSON.

    Raises:
        DatasetError: ``text`` is not JSON; the message names ``origin``.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{origin} is not JSON: {error}. It may be cut short; fetch it again.") from error
