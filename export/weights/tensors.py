"""Read weight files safely and strictly: no code is run, and no tensor is ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from export.weights.pickles import objects_from_torch_file
from runtime.errors import CheckpointError
from runtime.storage import GIT_LFS_POINTER

__all__ = [
    "WEIGHT_SUFFIXES",
    "chosen_weights",
    "config_from_file",
    "in_one_line",
    "is_index_file",
    "load_strictly",
    "names_in_short",
    "state_dict_from_file",
    "weight_files",
    "without_prefix",
    "without_still_buffers",
    "without_wrappers",
]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_TRAINING_FILES = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "adapter_model")
"""Name prefixes of files that trainers write beside the weights, none of which holds a model."""

_STATES = ("state_dict", "model_state_dict", "model", "module")
_AVERAGES = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "ema_model",
    "averaged_model",
    "swa_state_dict",
)


def chosen_weights(folder: Path, preferred: Sequence[str], *, apart_from: Sequence[str] = ()) -> Path:
    """Return the weight file of a folder: the first ``preferred`` name that exists, or else the only file.

    Raises:
        CheckpointError: no weight file exists, or several do and none has a preferred name.
    """
    found = [p for p in weight_files(folder) if p.name not in apart_from]
    for name in preferred:
        if folder / name in found:
            return folder / name
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder} holds {len(found)} weight files ({names_in_short([p.name for p in found])}), and "
            "it is not clear which one to use. Pass the file itself instead of its folder."
        )
    raise CheckpointError(
        f"{folder} holds no weights; expected one of {list(preferred)}, or a single file that ends in one of "
        f"{list(WEIGHT_SUFFIXES)}. Copy the checkpoint folder again, whole."
    )


def weight_files(folder: Path) -> list[Path]:
    """List a folder's weight files, sharded ones as their index, without those of trainers and adapters."""
    indices = [p for p in sorted(folder.iterdir()) if is_index_file(p)]
    shards = {name for index in indices for name in _shards_of(index)}
    single = [
        p
        for p in sorted(folder.iterdir())
        if p.suffix in WEIGHT_SUFFIXES and p.name not in shards and not p.name.startswith(_TRAINING_FILES)
    ]
    return [p for p in (*indices, *single) if p.is_file()]


def is_index_file(path: Path) -> bool:
    """Return True for the index file of a sharded checkpoint."""
    return path.name.endswith(_INDEX_SUFFIXES)


def state_dict_from_file(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file, a ``torch.save`` file, or the index of a sharded one.

    From a training checkpoint (open_clip's ``epoch_latest.pt``, Lightning's ``.ckpt``) only the model's
    weights are read; optimiser states and hyperparameters are not built.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt, a pickle that would run code, or holds two
            sets of weights (such as an EMA copy).
    """
    if not path.is_file():
        raise CheckpointError(f"Weight file {path} is missing. Copy the checkpoint folder again, whole.")
    _refuse_placeholders(path)
    if is_index_file(path):
        return _state_of_shards(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return _only_state(objects_from_torch_file(path), path)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, origin: Path) -> None:
    """Load weights into a module in FP32; every name, shape and type must match.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or an integer in place of a
            float; the message names the first ones.
    """
    wanted = module.state_dict()
    faults = [f"{name} is missing" for name in wanted.keys() - state.keys()]
    faults += [f"{name} is unexpected" for name in state.keys() - wanted.keys()]
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    faults += [
        f"{name} is stored as {str(state[name].dtype).removeprefix('torch.')}, which needs a scale to be read"
        for name in wanted.keys() & state.keys()
        if wanted[name].is_floating_point() and not state[name].is_floating_point()
    ]
    if faults:
        raise CheckpointError(
            f"{origin} does not match its architecture: {names_in_short(faults, '; ')}; {len(faults)} "
            "faults in total. The configuration beside it belongs to another checkpoint, or the file to "
            "another model."
        )
    # Assigned, not copied, since a large checkpoint might not fit into memory twice.
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True, assign=True)


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def without_wrappers(state: Mapping[str, Tensor], anchor: str, *, origin: Path) -> dict[str, Tensor]:
    """Remove the name prefixes of training wrappers (``model.module.``).

    ``anchor`` is a submodule that every such model has, such as ``visual.``; the prefix is what precedes it.
    Tensors outside the wrappers keep their names, so that a strict load reports them.

    Raises:
        CheckpointError: the file holds no such model, two of them (a teacher and its student), or an
            unmerged LoRA adapter.
    """
    names: dict[str, str] = {}
    for stored in state:
        name = re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", stored)
        twin = names.setdefault(name, stored)
        if twin != stored and not torch.equal(state[twin], state[stored]):
            raise CheckpointError(
                f"{origin} holds {twin} and {stored} with different values, and it is not clear which one to "
                "use. Save the model's state_dict() again, without the wrapper."
            )
    unmerged = [name for name in names if ".lora_A." in name or ".lora_B." in name]
    if unmerged:
        raise CheckpointError(
            f"{origin} holds a model with an unmerged LoRA adapter ({names_in_short(unmerged, n=2)}), but "
            "not the adapter's scale. Save the adapter with save_pretrained and pass its folder, or save the "
            "merged model (merge_and_unload)."
        )
    found = {
        name[: i.start()] for name in names for i in re.finditer(rf"(?:(?<=\.)|^){re.escape(anchor)}", name)
    }
    if not found:
        raise CheckpointError(
            f"{origin} holds another kind of model: none of its {len(state)} tensors is named {anchor}… "
            f"(they are {names_in_short(list(names), n=3)}). Put its own configuration beside it."
        )
    prefixes = {prefix for prefix in found if not any(prefix != p and prefix.startswith(p) for p in found)}
    if len(prefixes) > 1:
        shown = ", ".join(repr(p) for p in sorted(prefixes))
        raise CheckpointError(
            f"{origin} holds {len(prefixes)} models, under {shown}, and it is not clear which one to use. "
            "Save only the state_dict of the one you need."
        )
    prefix = next(iter(prefixes), "")
    return {name.removeprefix(prefix): state[own] for name, own in names.items()}


def without_still_buffers(
    state: Mapping[str, Tensor], module: nn.Module, *, origin: Path
) -> dict[str, Tensor]:
    """Drop constant buffers saved by older transformers versions, after checking their values.

    These are ``position_ids`` that count from 0, ``token_type_ids`` of zeros, and M2M100's sinusoidal
    ``embed_positions.weights``. Buffers that are in the module's state dict are kept.

    Raises:
        CheckpointError: the values of a buffer differ from those that the architecture computes.
    """
    kept = dict(state)
    wanted = module.state_dict().keys()
    buffers = dict(module.named_buffers())
    for name in [name for name in state if name not in wanted]:
        last = name.rpartition(".")[2]
        if last == "position_ids":
            same = torch.equal(state[name].flatten().long(), torch.arange(state[name].numel()))
        elif last == "token_type_ids":
            same = not bool(state[name].any())
        elif name.endswith("embed_positions.weights") and name in buffers:
            same = _same_positions(state[name], buffers[name])
        else:
            continue
        if not same:
            raise CheckpointError(
                f"{origin} holds {name} with values that differ from those that this architecture computes. "
                "It comes from another implementation of the model, which would give different vectors."
            )
        del kept[name]
    return kept


def names_in_short(names: list[str], separator: str = ", ", *, n: int = 4) -> str:
    """Join the first few names, sorted, with the number of further ones."""
    shown = separator.join(sorted(names)[:n])
    return shown + (f"{separator}and {len(names) - n} more" if len(names) > n and separator == ", " else "")


def in_one_line(error: BaseException) -> str:
    """Return a library's error message on one line, shortened."""
    return " ".join(str(error).split())[:240] or type(error).__name__


def config_from_file(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, truncated, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Copy the checkpoint folder again, whole.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). Copy it again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(data).__name__}; expected an object. Copy it again."
        )
    return data


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {in_one_line(error)}. "
            "The file is cut short or corrupt: copy it again."
        ) from error


def _only_state(data: Any, path: Path) -> dict[str, Tensor]:
    """Return the only set of weights in a training script's file."""
    if not isinstance(data, Mapping):
        raise CheckpointError(
            f"{path} holds {type(data).__name__}, not a mapping of names to tensors. "
            "Save the model's state_dict() with torch.save, and pass that file."
        )
    named = [key for key in (*_STATES, *_AVERAGES) if isinstance(data.get(key), Mapping) and data[key]]
    if len(named) > 1:
        raise CheckpointError(
            f"{path} holds {len(named)} sets of weights ({', '.join(named)}), and it is not clear which one "
            f"to use. Save only the one you need, with torch.save(checkpoint[{named[-1]!r}], FILE)."
        )
    state = data[named[0]] if named else data
    if named and (second := next(_other_sets(data, state), None)):
        raise CheckpointError(
            f"{path} holds another set of weights in {second!r} beside {named[0]!r}, and it is not clear "
            f"which one to use. Save only the one you need, with torch.save(checkpoint[{named[0]!r}], FILE)."
        )
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not all(isinstance(name, str) for name in state):
        raise CheckpointError(
            f"{path} holds {type(state[next(iter(state))]).__name__}, not a mapping of names to tensors "
            f"({names_in_short(others)}). Save the model's state_dict() with torch.save, and pass that file."
        )
    strange = [name for name, tensor in state.items() if tensor.layout is not torch.strided]
    if strange:
        raise CheckpointError(
            f"{path} holds sparse tensors ({names_in_short(strange)}); expected dense ones."
        )
    return dict(state)


_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|teacher|averaged?)([^a-z]|$)")


def _other_sets(data: Any, chosen: Mapping[Any, Any], path: str = "", depth: int = 4) -> Iterator[str]:
    """Yield other entries of a training checkpoint with the same names, or with averaged weights."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(data, Mapping):
        items = data.items()
    elif isinstance(data, (list, tuple)):
        items = enumerate(data)
    for key, value in items:
        if value is chosen or depth == 0:
            continue
        place = f"{path}.{key}" if path else str(key)
        tensors = value.values() if isinstance(value, Mapping) else value
        if isinstance(value, (Mapping, list, tuple)) and any(isinstance(t, Tensor) for t in tensors):
            known = sum(name in chosen for name in value) if isinstance(value, Mapping) else 0
            if 2 * known >= len(chosen) or _AVERAGED.search(place.lower()):
                yield place
        yield from _other_sets(value, chosen, place, depth - 1)


def _state_of_shards(index: Path) -> dict[str, Tensor]:
    places = config_from_file(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(
            f"{index} has no valid 'weight_map' of shards. Copy the checkpoint folder again, whole."
        )
    state: dict[str, Tensor] = {}
    for name in sorted(_shards_of(index)):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a shard outside its folder, {name!r}. Copy it again.")
        part = state_dict_from_file(index.parent / name)
        listed = {key for key, place in places.items() if place == name}
        faults = [f"{key} is missing" for key in listed - part.keys()]
        faults += [f"{key} is not listed" for key in part.keys() - listed]
        if faults:
            raise CheckpointError(
                f"{index.parent / name} does not fit {index.name}: {names_in_short(faults)}. "
                "The shards belong to different checkpoints. Copy the folder again, whole."
            )
        state |= part
    return state


def _shards_of(index: Path) -> Iterator[str]:
    places = config_from_file(index).get("weight_map")
    if isinstance(places, dict):
        yield from {name for name in places.values() if isinstance(name, str)}


def _refuse_placeholders(path: Path) -> None:
    """Reject files left by a failed download: empty files, Git LFS pointers and HTML pages."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} (0 bytes) cannot be read: it is empty. Copy it again.")
    if start.startswith(GIT_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the weights. "
            "Run 'git lfs pull' in its folder, or download the file itself."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is an HTML page, not weights. Download the file itself.")


def _same_positions(saved: Tensor, computed: Tensor) -> bool:
    """Compare saved sinusoidal positions with computed ones, within the saved precision."""
    if saved.ndim != 2 or saved.shape[1] != computed.shape[1] or not saved.is_floating_point():
        return False
    n = min(len(saved), len(computed))
    tolerance = 1e-5 if saved.dtype in (torch.float32, torch.float64) else 1e-2
    return torch.allclose(saved[:n].float(), computed[:n].float(), atol=tolerance, rtol=0)
