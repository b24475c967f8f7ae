"""A folder, a file or a hub name → the towers it holds."""

from __future__ import annotations

from pathlib import Path

from export.families import FAMILIES, Family, LoadOptions
from export.towers import Towers
from runtime.errors import CheckpointError

__all__ = ["family_of_checkpoint", "folder_from_name", "towers_from_checkpoint"]

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.ckpt", "*.model", "*.txt", "README.md"]


def towers_from_checkpoint(
    checkpoint: str | Path, *, base: str | Path | None = None, context_length: int | None = None
) -> Towers:
    """Read both towers of a checkpoint: a local folder, a ``.ckpt`` file, or a hub name.

    Args:
        base: The checkpoint below a LoRA adapter that does not say where its base lies.
        context_length: Longest text, in tokens, special tokens included; the family's own by default
            (77). NLLB-CLIP's author evaluates with 100.

    Raises:
        CheckpointError: there is no such checkpoint, no family claims it, or it cannot be read faithfully.
    """
    path = folder_from_name(checkpoint)
    family = family_of_checkpoint(path)
    options = LoadOptions(
        base=None if base is None else folder_from_name(base),
        context_length=context_length,
    )
    return family.load(path, options)


def family_of_checkpoint(path: Path) -> Family:
    """The family that claims a folder.

    Raises:
        CheckpointError: none does.
    """
    for family in FAMILIES:
        if family.claims(path):
            return family
    found = sorted(p.name for p in path.iterdir())[:12] if path.is_dir() else [path.name]
    known = "; ".join(f"{family.name}: {family.forms}" for family in FAMILIES)
    raise CheckpointError(f"{path} is a checkpoint of no known family. It holds {found}. Known are {known}.")


def folder_from_name(name: str | Path) -> Path:
    """A local path as it stands, else a hub name from the local cache or, where there is one, the network.

    Raises:
        CheckpointError: neither a path nor a hub name that can be had.
    """
    path = Path(str(name).removeprefix("hf-hub:"))
    if path.exists():
        return path
    if str(path).count("/") != 1 or path.is_absolute() or str(path).startswith("."):
        raise CheckpointError(f"There is no checkpoint at {path}. Pass a folder, a .ckpt file or a hub name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=_HUB_PATTERNS))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is neither a local folder nor a hub repository that can be had from here "
            f"({str(error).strip().splitlines()[0]}). Download it first, and pass the folder."
        ) from error
