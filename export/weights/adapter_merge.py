"""Merge a LoRA adapter into its base, and check the result against peft's unmerged forward pass.

The merge is plain arithmetic on the base's weights and the adapter's tensors. The check is independent of it:
peft builds the adapted model on a copy of the base, loads the same tensors in its own way, and computes
vectors without merging. Both must agree, and both must differ from the base.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from export.weights.adapters import Adapter, AdapterTensor
from export.weights.tensors import in_one_line, names_in_short
from runtime.errors import CheckpointError

__all__ = ["Probe", "merge_adapter", "random_inputs"]

Probe = Callable[[nn.Module], Mapping[str, Tensor]]
"""Function that returns a model's vectors of fixed, distinct inputs, by tower."""

LIMIT = 1e-5
"""Maximum difference between merged and unmerged vectors, relative to their largest component."""

_WRAPPERS = ("module", "model", "clip_model", "clip", "base_model")
"""Attribute names under which training code wraps a model; they may prefix an adapter's names."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Location of an adapter: submodule ``root`` of the model, and ``prefix`` of the adapter's names."""

    root: str
    prefix: tuple[str, ...]

    def inside(self, path: str) -> str:
        """Convert an adapter's path to one relative to the root."""
        return path.removeprefix("".join(f"{word}." for word in self.prefix))

    def full(self, path: str) -> str:
        """Convert an adapter's path to one relative to the whole model."""
        inner = self.inside(path)
        return f"{self.root}.{inner}" if self.root else inner


def merge_adapter(model: nn.Module, adapter: Adapter, probe: Probe) -> nn.Module:
    """Merge an adapter into a model's weights, in place.

    Returns:
        The unmerged model with peft's layers, against which the merge was checked.

    Raises:
        CheckpointError: the adapter's tensors do not match the base, or are missing from its file; peft does
            not confirm the merge; or the adapter changes no vector.
    """
    adapter = _with_names_of(model, adapter)
    place = _place_of(adapter, model)
    unmerged, adapter = _unmerged_twin(model, adapter, place)
    base = dict(probe(model))
    whole = {place.full(t.module): t.tensor for t in adapter.tensors if t.part is None}
    for name, tensor in {**_merged_weights(model, adapter, place), **whole}.items():
        _set_parameter(model, name, tensor)
    _check(adapter, base=base, merged=probe(model), unmerged=probe(unmerged))
    return unmerged


def random_inputs(*, n_tokens: int, pad_id: int, image_size: Any) -> tuple[Tensor, Tensor]:
    """Return token ids (4, 12), two rows padded, and pixels (2, 3, height, width), with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(4, n_tokens - 1), n_tokens, (4, 12), generator=generator)
    ids[2:, 7:] = pad_id
    height, width = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    return ids, torch.randn(2, 3, int(height), int(width), generator=generator)


def _with_names_of(model: nn.Module, adapter: Adapter) -> Adapter:
    """Rename AltCLIP's ``encoder.layer`` to ``encoder.layers``, as newer transformers do."""
    known = [name for name, _ in model.named_modules()]
    if any(".encoder.layer." in name for name in known):
        return adapter
    renamed = tuple(
        AdapterTensor(t.name, re.sub(r"\bencoder\.layer\.", "encoder.layers.", t.module), t.part, t.tensor)
        for t in adapter.tensors
    )
    return Adapter(adapter.folder, adapter.file, adapter.config, renamed)


def _place_of(adapter: Adapter, model: nn.Module) -> _Place:
    """Find the unique location in the model where all names of the adapter resolve."""
    paths = [t.module for t in adapter.tensors]
    roots = {name: module for name, module in model.named_modules() if not _is_leaf(module)}
    places = []
    for prefix in _prefixes(paths):
        for root in roots:
            place = _Place(root, prefix)
            if all(_resolves(model, place.full(t.module), whole=t.part is None) for t in adapter.tensors):
                places.append(place)
        if places:
            break
    named = [p for p in places if type(roots[p.root]).__name__ == adapter.base_class]
    chosen = named or places
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        best = max(
            (_Place(root, prefix) for prefix in _prefixes(paths) for root in roots),
            key=lambda p: sum(
                _resolves(model, p.full(t.module), whole=t.part is None) for t in adapter.tensors
            ),
        )
        lost = [
            t.name for t in adapter.tensors if not _resolves(model, best.full(t.module), whole=t.part is None)
        ]
        raise CheckpointError(
            f"The adapter in {adapter.folder} does not fit its base: {len(lost)} of {len(paths)} tensors "
            f"have no matching module ({names_in_short(lost)}). Pass the base it was trained on with --base "
            "FOLDER."
        )
    raise CheckpointError(
        f"The adapter in {adapter.folder} fits its base in {len(chosen)} places "
        f"({', '.join(p.root or 'the whole model' for p in chosen)}), and its auto_mapping names none of "
        "them. Save it again with peft, from the tower that it was trained on."
    )


def _prefixes(paths: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield the empty prefix, then increasingly long prefixes of wrapper names shared by all paths."""
    prefix: tuple[str, ...] = ()
    yield prefix
    words = paths[0].split(".")
    for n, word in enumerate(words[:-1], start=1):
        start = ".".join(words[:n]) + "."
        if word not in _WRAPPERS or not all(path.startswith(start) for path in paths):
            return
        prefix = tuple(words[:n])
        yield prefix


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _resolves(model: nn.Module, path: str, *, whole: bool) -> bool:
    try:
        if whole:
            model.get_parameter(path)
        else:
            model.get_submodule(path)
    except AttributeError:
        return False
    return True


# Merged weights, by plain arithmetic


def _merged_weights(model: nn.Module, adapter: Adapter, place: _Place) -> dict[str, Tensor]:
    """Compute the merged weights of all adapted modules, by name.

    The arithmetic is in float64 and rounded once when set, so that weights are the same on all processors.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for found in adapter.tensors:
        if found.part is not None:
            parts.setdefault(found.module, {})[found.part] = found.tensor.double()
    merged: dict[str, Tensor] = {}
    for path, tensors in parts.items():
        module = model.get_submodule(place.full(path))
        owner, _, last = path.rpartition(".")
        # peft adds the delta of out_proj twice if the whole nn.MultiheadAttention is adapted, in training too
        times = 2 if last == "out_proj" and owner in parts else 1
        merged |= {
            f"{place.full(path)}.{name}": tensor
            for name, tensor in _merged_module(module, path, tensors, adapter, times=times).items()
        }
    return merged


def _merged_module(
    module: nn.Module, path: str, tensors: Mapping[str, Tensor], adapter: Adapter, *, times: int
) -> dict[str, Tensor]:
    scale = times * _scale(adapter, path, tensors)
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    weight = module.get_parameter(name).detach().double()
    try:
        changed = weight + _delta(module, tensors).reshape(weight.shape) * scale
    except RuntimeError as error:
        raise _misfit(adapter, path, tensors, weight) from error
    found = {name: changed}
    if (magnitude := tensors.get("lora_magnitude_vector")) is not None:
        if not isinstance(module, nn.Linear) or magnitude.numel() != len(changed):
            raise CheckpointError(
                f"{adapter.file} uses DoRA on {path}, a {type(module).__name__}; only linear layers are "
                "supported. Merge the adapter with peft (merge_and_unload), and export the merged checkpoint."
            )
        found[name] = changed * (magnitude.reshape(-1, 1) / changed.norm(dim=1, keepdim=True))
    if (extra := tensors.get("lora_B.bias")) is not None:
        found["bias"] = module.get_parameter("bias").detach().double() + extra * scale
    return found


def _delta(module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """Compute B·A in the weight's layout, unscaled.

    Source: LoRA, arXiv 2106.09685, section 4.1; for embeddings the table is the transpose.
    """
    if "lora_embedding_A" in tensors:
        return (tensors["lora_embedding_B"] @ tensors["lora_embedding_A"]).T
    down, up = tensors["lora_A"], tensors["lora_B"]
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups != 1:
        raise RuntimeError("grouped convolution")
    return up.flatten(1) @ down.flatten(1)


def _scale(adapter: Adapter, path: str, tensors: Mapping[str, Tensor]) -> float:
    """Return alpha / r, or alpha / √r for rsLoRA (arXiv 2312.03732), with the module's patterns applied."""
    config = adapter.config
    rank = _pattern(config.get("rank_pattern"), path, config.get("r", 8))
    alpha = _pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    down = tensors.get("lora_A", tensors.get("lora_embedding_A"))
    found = 0 if down is None else len(down)
    if found != rank:
        raise CheckpointError(
            f"{adapter.file} has rank {found} at {path}, but adapter_config.json says {rank:g}. "
            "The configuration belongs to another adapter: copy the folder again, whole."
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _misfit(adapter: Adapter, path: str, tensors: Mapping[str, Tensor], weight: Tensor) -> CheckpointError:
    shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
    return CheckpointError(
        f"The adapter in {adapter.folder} does not fit its base: {path} has a weight of shape "
        f"{tuple(weight.shape)}, the adapter {shapes}. Pass the base it was trained on with --base FOLDER."
    )


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, last, nn.Parameter(tensor.detach().float().contiguous(), requires_grad=False))


# Unmerged reference model, by peft


def _unmerged_twin(model: nn.Module, adapter: Adapter, place: _Place) -> tuple[nn.Module, Adapter]:
    """Copy the model with peft's layers and the adapter; return it and the adapter without base weights."""
    import peft

    twin = _twin(model, adapter, place)
    root = twin.get_submodule(place.root)
    try:
        with _quiet():
            adapted = peft.PeftModel(_wrapped(root, place.prefix), _peft_config(adapter))
            expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
            names = {_plain(name): name for name in expected}  # peft's own, for the same tensors
            adapter = _without_base_copies(adapter, model, place, names)
            _check_names(adapter, names)
            peft.set_peft_model_state_dict(adapted, {names[_key(t)]: t.tensor for t in adapter.tensors})
            _check_loaded(adapter, peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except CheckpointError:
        raise
    except Exception as error:  # peft's exceptions have no common base class
        if isinstance(error, MemoryError):
            raise
        raise CheckpointError(
            f"The adapter in {adapter.folder} does not fit its base: peft reports "
            f"{in_one_line(error)!r}. "
            "Pass the base it was trained on with --base FOLDER, or copy the adapter again."
        ) from error
    adapted.eval().requires_grad_(False)
    if place.root and not place.prefix:
        _set_module(twin, place.root, adapted)
    return twin.eval(), adapter


def _twin(model: nn.Module, adapter: Adapter, place: _Place) -> nn.Module:
    """Copy the model, sharing all tensors except those that peft modifies."""
    replaced = {place.full(t.module) for t in adapter.tensors if t.part is None}
    touched = {place.full(t.module) for t in adapter.tensors if t.part}
    packed = any(isinstance(model.get_submodule(path), nn.MultiheadAttention) for path in touched)
    shared = {
        id(tensor): tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not packed and name not in replaced
    }
    return copy.deepcopy(model, memo=cast("dict[int, Any]", shared))


def _without_base_copies(
    adapter: Adapter, model: nn.Module, place: _Place, names: Mapping[str, str]
) -> Adapter:
    """Drop base weights saved in the adapter's file; they must be bit-identical to this base's."""
    kept = []
    for found in adapter.tensors:
        kept_beside = ".original_module." in found.name
        if found.part is not None or (_key(found) in names and not kept_beside):
            kept.append(found)
            continue
        own = model.get_parameter(place.full(found.module))
        if own.shape == found.tensor.shape and torch.equal(own.to(found.tensor.dtype), found.tensor):
            continue
        if kept_beside:
            raise CheckpointError(
                f"The adapter in {adapter.folder} does not fit its base: it was trained on other weights "
                f"({found.name} differs). Pass the base it was trained on with --base FOLDER."
            )
        kept.append(found)
    return Adapter(adapter.folder, adapter.file, adapter.config, tuple(kept))


class _Nest(nn.Module):
    """Wrapper that holds a model under the attribute name used by training code."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def _wrapped(root: nn.Module, prefix: tuple[str, ...]) -> nn.Module:
    for name in reversed(prefix):
        root = _Nest(name, root)
    return root


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, last = path.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def _peft_config(adapter: Adapter) -> Any:
    import peft

    fields = peft.LoraConfig.__dataclass_fields__
    idle = ("auto_mapping", "loftq_config", "eva_config", "corda_config", "runtime_config", "peft_type")
    known = {k: v for k, v in adapter.config.items() if k in fields and k not in idle and v is not None}
    return peft.LoraConfig(
        **{**known, "init_lora_weights": True, "inference_mode": True, "lora_dropout": 0.0}
    )


def _plain(name: str) -> str:
    """Normalise a tensor name across peft's versions and layer types."""
    name = re.sub(r"\.base_layer(?=\.)", "", name).removeprefix("base_model.model.")
    return name.removesuffix(".weight")


def _key(tensor: AdapterTensor) -> str:
    return _plain(f"{tensor.module}.{tensor.part}" if tensor.part else tensor.module)


def _check_names(adapter: Adapter, asked: Mapping[str, str]) -> None:
    """Check that the file has exactly the tensors that the configuration requires."""
    held = {_key(t): t.name for t in adapter.tensors}
    missing = [asked[name].removeprefix("base_model.model.") for name in asked.keys() - held.keys()]
    if missing:
        raise CheckpointError(
            f"{adapter.file} is incomplete: adapter_config.json requires {len(asked)} tensors, and "
            f"{len(missing)} are missing ({names_in_short(missing)}). Copy or save the adapter again."
        )
    extra = [held[name] for name in held.keys() - asked.keys()]
    if extra:
        raise CheckpointError(
            f"{adapter.file} holds {len(extra)} tensors that adapter_config.json does not describe "
            f"({names_in_short(extra)}). The configuration belongs to another adapter: copy the folder again."
        )


def _check_loaded(adapter: Adapter, loaded: Mapping[str, Tensor]) -> None:
    """Check that every tensor was loaded, since peft silently ignores unknown names."""
    arrived = {_plain(name): tensor for name, tensor in loaded.items()}
    lost = [
        t.name
        for t in adapter.tensors
        if (found := arrived.get(_key(t))) is None
        or found.shape != t.tensor.shape
        or not torch.equal(found.float(), t.tensor.float())
    ]
    if lost:
        raise CheckpointError(
            f"The adapter in {adapter.folder} does not fit its base: peft did not load "
            f"{names_in_short(lost)}. Save the adapter again with the installed peft."
        )


def _check(
    adapter: Adapter,
    *,
    base: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    unmerged: Mapping[str, Tensor],
) -> None:
    changes, errors = {}, {}
    for tower, vectors in unmerged.items():
        size = float(vectors.abs().max()) or 1.0
        changes[tower] = float((vectors - base[tower]).abs().max()) / size
        errors[tower] = float((vectors - merged[tower]).abs().max()) / size
    tower, error = max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    if not error <= LIMIT:
        raise CheckpointError(
            f"Merging the adapter in {adapter.folder} changed its {tower} vectors by {error:.2e} of "
            f"their size (limit {LIMIT:g}) relative to peft's unmerged model, so it cannot be merged "
            "exactly. Merge it with peft (merge_and_unload), and export the merged checkpoint."
        )
    if not max(changes.values()) > 0:
        raise CheckpointError(
            f"The adapter in {adapter.folder} changes no vector of its base: its matrices are zero (was "
            "it saved before training?), or it adapts no module that embeddings use. Export the base itself, "
            "or train the adapter."
        )
    if max(changes.values()) < 2 * error:
        raise CheckpointError(
            f"The adapter in {adapter.folder} changes vectors by {max(changes.values()):.2e} of their "
            f"size, which is no more than rounding ({error:.2e}), so the merge cannot be verified. Export "
            "the base itself."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of peft and transformers, whose causes are checked and raised here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
