"""Passed opening checks, remembered: a file for each, named by the hash of everything that it depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.machine import machine_facts
from runtime.storage import replace_text

__all__ = ["PassCache", "default_cache_folder", "kernel_facts"]

_KERNEL_VARIABLES = ("DNNL_", "GLIBC_TUNABLES", "MKL_", "MLAS_", "ONEDNN_", "OPENVINO_", "ORT_", "OV_")
"""How environment variables begin that change which kernels an engine takes (``ONEDNN_MAX_CPU_ISA``)."""


def default_cache_folder() -> Path | None:
    """``babeltower/opening`` in the user's cache; ``None`` where there is no home."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(named) if named else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "babeltower" / "opening"


def kernel_facts() -> dict[str, Any]:
    """Facts that decide, beside graph and engine, how a CPU computes."""
    return {
        **machine_facts(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_KERNEL_VARIABLES)},
    }


_MAX_BYTES = 1 << 20
"""A larger file is none of ours."""


@dataclass(frozen=True, slots=True)
class PassCache:
    """A folder of passed checks; where it cannot be read or written, nothing is remembered.

    Processes may share it: a file is written beside and renamed, and holds the facts that it is named by.
    """

    folder: Path | None

    def has(self, facts: Mapping[str, Any]) -> bool:
        """Tell if a check under these very facts passed before; a damaged file counts as none."""
        path = self._path(facts)
        if path is None:
            return False
        try:
            if not path.is_file() or path.stat().st_size > _MAX_BYTES:
                return False
            return bool(json.loads(path.read_bytes()) == _plain(facts))
        except (OSError, ValueError, RecursionError):
            return False

    def add(self, facts: Mapping[str, Any]) -> None:
        """Remember a pass."""
        path = self._path(facts)
        if path is None:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(facts, indent=1, sort_keys=True) + "\n")

    def _path(self, facts: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:40]}.json"


def _plain(facts: Mapping[str, Any]) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(facts))
