"""Names of the layouts, as the command line takes them; nothing is imported with them."""

from __future__ import annotations

from enum import Enum

__all__ = ["LayoutName"]


class LayoutName(str, Enum):
    """Form of an export on disk: a Triton model repository, another server's model folder, or a web page."""

    TRITON = "triton"
    IMMICH = "immich"
    WEB = "web"
