"""Weight files, read with nothing executed and every failure named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.errors import CheckpointError

__all__ = ["config_from_file", "load_strictly", "state_dict_from_file", "without_prefix"]


def state_dict_from_file(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors, ``.bin``, ``.pt`` or Lightning ``.ckpt`` file.

    Raises:
        CheckpointError: the file is missing, cut short, corrupt, or a pickle that wants to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"Weight file {path} is missing. Copy the checkpoint folder again, whole.")
    try:
        data: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is corrupt, or a pickle that would run code when loaded, which is refused "
            f"({_first_line(error)}). Copy it again, or convert it to safetensors where you trust it."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {_first_line(error)}. "
            "The file is cut short or corrupt: copy it again."
        ) from error
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not a mapping of names to tensors.")
    return dict(data)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, origin: Path) -> None:
    """Copy weights into a module; every name and shape must fit.

    Raises:
        CheckpointError: names the first tensors that are missing, unexpected or of another shape.
    """
    wanted = module.state_dict()
    faults = [f"{name} is missing" for name in wanted.keys() - state.keys()]
    faults += [f"{name} is unexpected" for name in state.keys() - wanted.keys()]
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, the architecture wants {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:4])
        raise CheckpointError(
            f"{origin} does not fit its architecture: {shown}; {len(faults)} faults in all. "
            "The configuration beside it belongs to another checkpoint, or the file is of another model."
        )
    # Assigned, not copied: a large checkpoint would not fit twice.
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True, assign=True)


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def config_from_file(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: missing, cut short, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Copy the checkpoint folder again, whole.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}). Copy it again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, expected an object.")
    return data


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
