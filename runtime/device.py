"""Names of the devices that graphs run on: ``cpu``, ``cuda`` or ``cuda:1``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from runtime.errors import EngineError

__all__ = ["CPU", "Device", "device_from_name"]

_CUDA = re.compile(r"cuda(?::(0|[1-9][0-9]{0,2}))?")


@dataclass(frozen=True, slots=True)
class Device:
    """The processor, or an NVIDIA GPU with its ordinal as CUDA counts them."""

    gpu: int | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.gpu is not None

    def __str__(self) -> str:
        return "cpu" if self.gpu is None else f"cuda:{self.gpu}"


CPU = Device()


def device_from_name(name: str | Device) -> Device:
    """Convert ``cpu``, ``cuda`` (the first GPU) or ``cuda:N`` to a device; whether it exists is not checked.

    Raises:
        EngineError: the name is none of these.
    """
    if isinstance(name, Device):
        return name
    if name == "cpu":
        return CPU
    found = _CUDA.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise EngineError(f"Device {name!r} is unknown; expected 'cpu', 'cuda' or 'cuda:N'.")
    return Device(int(found[1] or 0))
