"""Load towers from a checkpoint folder, a weight file or a hub name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from export.families import FAMILIES, Family, LoadOptions
from export.towers import Towers
from export.weights.adapters import Adapter, adapter_from_folder, is_adapter, named_base
from export.weights.tensors import WEIGHT_SUFFIXES, in_one_line
from runtime.errors import BabeltowerError, CheckpointError

__all__ = ["family_of_checkpoint", "folder_from_name", "towers_from_checkpoint"]

_HUB_PATTERNS = ["*.json", *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES), "*.model", "*.txt", "README.md"]
_PUBLISHED_BASE = "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k"


def towers_from_checkpoint(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    context_length: int | None = None,
    image_tower: str | Path | None = None,
) -> Towers:
    """Read both towers of a checkpoint: a local folder, a weight file in one, or a hub name.

    An adapter folder (peft's LoRA) becomes its base with the adapter merged: family, languages, MRL heads and
    licence are the base's.

    Args:
        base: Base checkpoint of a LoRA adapter; needed where the adapter does not record it.
        context_length: Maximum text length in tokens, special tokens included; the family's own by
            default (77). NLLB-CLIP's author evaluates with 100.
        image_tower: Open_clip folder or hub name of the image tower, for checkpoints of the text tower alone
            (M-CLIP).

    Raises:
        CheckpointError: the checkpoint does not exist, no family claims it, or it cannot be read exactly.
    """
    path = folder_from_name(checkpoint)
    adapter: Adapter | None = None
    if is_adapter(path):
        adapter = adapter_from_folder(path)
        path = _base_of_adapter(path, base)
    elif base is not None:
        raise CheckpointError(
            f"A base ({base}) was given for {path}, which is not a LoRA adapter: it has no "
            "adapter_config.json. Leave --base out, or pass the adapter's folder."
        )
    family = family_of_checkpoint(path)
    if image_tower is not None and not family.needs_image_tower:
        raise CheckpointError(
            f"An image tower ({image_tower}) was given for {path}, but {family.name} checkpoints hold their "
            "own. Leave --image-tower out."
        )
    options = LoadOptions(
        adapter=adapter,
        context_length=context_length,
        image_tower=None if image_tower is None else folder_from_name(image_tower),
    )
    try:
        towers = family.load(path, options)
        _check_reference(towers, path)
        return towers
    except (BabeltowerError, MemoryError):
        raise
    except Exception as error:  # three libraries read the configurations, each with errors of its own
        raise CheckpointError(
            f"{path} cannot be read as {family.name}: {type(error).__name__}: {in_one_line(error)}. A "
            "value in its configuration files is missing or of the wrong type; compare them with those "
            "of the published checkpoint."
        ) from error


def family_of_checkpoint(path: Path) -> Family:
    """Return the family that claims a folder or weight file.

    Raises:
        CheckpointError: no family claims it.
    """
    for family in FAMILIES:
        if family.claims(path):
            return family
    found = sorted(p.name for p in path.iterdir())[:12] if path.is_dir() else [path.name]
    known = "; ".join(f"{family.name}: {family.forms}" for family in FAMILIES)
    raise CheckpointError(
        f"{path} does not belong to any known family. It contains {found}. Known families: {known}."
    )


def folder_from_name(name: str | Path) -> Path:
    """Resolve a local path or a hub name; a hub name comes from the local cache or the network.

    Raises:
        CheckpointError: neither an existing path nor a hub repository that can be downloaded.
    """
    path = Path(str(name).removeprefix("hf-hub:"))
    if path.is_dir() or (path.name.endswith(WEIGHT_SUFFIXES) and path.is_file()):
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is not a checkpoint: expected a folder, or a weight file ({', '.join(WEIGHT_SUFFIXES)})."
        )
    if str(path).count("/") != 1 or path.is_absolute() or str(path).startswith("."):
        raise CheckpointError(
            f"There is no checkpoint at {path}. Pass a folder, a weight file or a hub name."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=_HUB_PATTERNS))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is neither a local folder nor a hub repository that can be downloaded from here "
            f"({in_one_line(error)}). Download it first and pass the folder."
        ) from error


def _check_reference(towers: Towers, path: Path) -> None:
    """Embed one short text and one grey image, since a model that loads may still fail to run."""
    ids = np.full((1, 3), towers.text_preprocessing.suffix_ids[-1], np.int64)
    image = Image.new("RGB", (64, 48), (128, 128, 128))
    found = {
        "text": towers.reference.text_vectors(ids)[towers.dim],
        "image": towers.reference.image_vectors(towers.reference.pixels(image)[None])[towers.dim],
    }
    for tower, vectors in found.items():
        if not np.isfinite(vectors).all():
            raise CheckpointError(
                f"The {tower} tower of {path} gives values that are not finite: its weights are damaged, "
                "or contain NaN from a diverged training run. Copy the file again, or use an earlier one."
            )


def _base_of_adapter(path: Path, given: str | Path | None) -> Path:
    named = named_base(path)
    if given is not None:
        base = folder_from_name(given)
    elif named is None:
        raise _without_base(path, named)
    elif (path / named).is_dir():
        base = (path / named).resolve()
    else:
        try:
            base = folder_from_name(named)
        except CheckpointError as error:
            raise _without_base(path, named) from error
    if is_adapter(base) and base.resolve() != path.resolve():
        raise CheckpointError(
            f"The base of {path} is {base}, itself a LoRA adapter. Merge that one into its own base "
            "first and pass the merged checkpoint with --base FOLDER."
        )
    return base


def _without_base(path: Path, named: str | None) -> CheckpointError:
    return CheckpointError(
        f"{path} is a LoRA adapter whose base was not found (it names {named!r}). "
        f"Pass --base FOLDER with its base checkpoint; CAPIVARA's published base is {_PUBLISHED_BASE}."
    )
