"""Cache of passed opening checks: one file per check, named by the hash of all facts it depends on."""

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
"""Prefixes of environment variables that change an engine's kernels (``ONEDNN_MAX_CPU_ISA``)."""


def default_cache_folder() -> Path | None:
    """Return ``babeltower/opening`` in the user's cache; ``None`` if there is no home folder."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(named) if named else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "babeltower" / "opening"


def kernel_facts() -> dict[str, Any]:
    """Return the facts that, besides graph and engine, determine how a CPU computes."""
    return {
        **machine_facts(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_KERNEL_VARIABLES)},
    }


_MAX_BYTES = 1 << 20
"""Largest size of a cache file; larger files are ignored."""


@dataclass(frozen=True, slots=True)
class PassCache:
    """Folder of passed checks; if it cannot be read or written, nothing is cached.

    Processes may share it: files are written atomically, and each holds the facts that its name hashes.
    """

    folder: Path | None

    def has(self, facts: Mapping[str, Any]) -> bool:
        """Check whether a check with exactly these facts passed before; damaged files are ignored."""
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
        """Record a passed check."""
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
    """Convert to plain JSON values, such as tuples to lists."""
    return json.loads(json.dumps(facts))
