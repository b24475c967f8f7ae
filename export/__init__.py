"""Export trained checkpoints to a Triton model repository, with a parity check against PyTorch.

Importing this package loads no torch; its functions do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.checkpoint import towers_from_checkpoint
    from export.repository import Export, repository_from_checkpoint

__all__ = ["Export", "repository_from_checkpoint", "towers_from_checkpoint"]

_HOMES = {
    "Export": "export.repository",
    "repository_from_checkpoint": "export.repository",
    "towers_from_checkpoint": "export.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
