"""Environment of a measurement; records from different environments are never compared."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from runtime.machine import cpu_model, instruction_sets, n_cores

__all__ = ["Environment", "environment"]

_PACKAGES = (
    "numpy",
    "torch",
    "transformers",
    "open_clip_torch",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "pillow",
)


@dataclass(frozen=True, slots=True)
class Environment:
    """A machine and its software.

    Attributes:
        cpu: Model name of the processor.
        instruction_sets: Instruction sets that affect matrix products, separated by spaces.
        n_cores: Logical cores that this process may use.
        versions: Versions by distribution name; packages that are not installed are left out.
        commit: Commit of the source tree, with ``-dirty`` if it was changed; ``None`` outside a checkout.
    """

    cpu: str
    instruction_sets: str
    n_cores: int
    system: str
    python: str
    versions: Mapping[str, str]
    commit: str | None


def environment() -> Environment:
    """Describe this machine and this process."""
    return Environment(
        cpu=cpu_model(),
        instruction_sets=" ".join(instruction_sets()),
        n_cores=n_cores(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=_versions(),
        commit=_commit(Path(__file__).resolve().parent),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
