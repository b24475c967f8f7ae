"""Read and check LoRA adapter folders (peft).

Only options that can be merged and verified are accepted: LoRA with its scales, rank and alpha patterns,
rsLoRA, DoRA, trained biases and ``modules_to_save``. Any other method, and any option that changes the
arithmetic or the base, is rejected by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.weights.tensors import config_from_file, names_in_short, state_dict_from_file
from runtime.errors import CheckpointError

__all__ = ["CONFIG_FILE", "Adapter", "AdapterTensor", "adapter_from_folder", "is_adapter", "named_base"]

CONFIG_FILE = "adapter_config.json"
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_READ_OPTIONS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)
_IDLE_OPTIONS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Options of training, initialisation and records, which do not affect a trained adapter's results."""

_FAITHFUL_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that do not change the base's weights (PiSSA does)."""

_WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"]
_PART = re.compile(
    r"^(?P<module>.*?)\.?\b(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<kind>weight|bias))?$"
)
_SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)(?=\.)")


@dataclass(frozen=True, slots=True, eq=False)
class AdapterTensor:
    """Tensor of an adapter.

    Attributes:
        name: Name in the file.
        module: Dotted path of the adapted module, in the model the adapter was trained on; for a whole
            parameter, the parameter's path.
        part: ``lora_A``, ``lora_B``, ``lora_B.bias`` and so on; None for a whole parameter.
    """

    name: str
    module: str
    part: str | None
    tensor: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Loaded LoRA adapter of a supported kind."""

    folder: Path
    file: Path
    config: Mapping[str, Any]
    tensors: tuple[AdapterTensor, ...]

    @property
    def base_class(self) -> str | None:
        """Class of the model that the adapter was trained on, if peft recorded it."""
        mapping = self.config.get("auto_mapping")
        return mapping.get("base_model_class") if isinstance(mapping, Mapping) else None


def is_adapter(path: Path) -> bool:
    """Return True if the folder holds an adapter rather than a model."""
    return (path / CONFIG_FILE).is_file()


def named_base(path: Path) -> str | None:
    """Return the base named in an adapter's configuration, a path or a hub name."""
    named = config_from_file(path / CONFIG_FILE).get("base_model_name_or_path")
    return named if isinstance(named, str) and named.strip() else None


def adapter_from_folder(folder: Path) -> Adapter:
    """Read an adapter's configuration and every tensor of its file.

    Raises:
        CheckpointError: the method is not LoRA, an option is not supported, or the file is missing, damaged,
            empty, or has no LoRA tensors.
    """
    config = config_from_file(folder / CONFIG_FILE)
    _check_config(config, folder)
    file = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder} holds no adapter weights; expected one of {list(_WEIGHT_FILES)}. "
            "Copy the adapter folder again, whole."
        )
    try:
        state = state_dict_from_file(file)
    except CheckpointError as error:
        raise CheckpointError(f"The adapter in {folder} does not fit its base: {error}") from error
    tensors = _without_adapter_names([_tensor_of(name, tensor) for name, tensor in state.items()], file)
    if not any(tensor.part for tensor in tensors):
        raise CheckpointError(
            f"{file} holds no LoRA tensor (lora_A, lora_B; found "
            f"{names_in_short(list(state)) or 'nothing'}), so it would not change its base. Save "
            "the adapter again with save_pretrained."
        )
    _check_numbers(tensors, file)
    return Adapter(folder=folder, file=file, config=config, tensors=tuple(tensors))


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{folder / CONFIG_FILE} describes an adapter of type {kind!r}; only peft's 'LORA' is supported. "
            "Merge it into its base with its own library, and export the merged checkpoint."
        )
    others = [name for name in config.keys() - _READ_OPTIONS - _IDLE_OPTIONS if config[name]]
    if others:
        shown = ", ".join(f"{name}={config[name]!r}" for name in sorted(others))
        raise CheckpointError(
            f"{folder / CONFIG_FILE} sets {shown}, which changes the arithmetic in a way that is not "
            "supported. Merge the adapter with peft (merge_and_unload), and export the merged checkpoint."
        )
    start = config.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _FAITHFUL_STARTS):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} sets init_lora_weights={start!r}, which alters the base when training "
            "starts. Convert the adapter (path_initial_model_for_weight_conversion of peft's "
            "save_pretrained)."
        )
    faults = [
        f"{name}={config[name]!r}"
        for name, allowed in _TYPES.items()
        if name in config and not (isinstance(config[name], allowed) and not _is_odd(name, config[name]))
    ]
    if faults:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has values that peft does not write: {', '.join(faults)}. Copy it again."
        )
    if not config.get("target_modules"):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names no target_modules. Copy the adapter folder again, whole."
        )


_NONE: Any = type(None)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "target_modules": (str, list, _NONE),
    "exclude_modules": (str, list, _NONE),
    "modules_to_save": (list, _NONE),
    "rank_pattern": (dict, _NONE),
    "alpha_pattern": (dict, _NONE),
    "layers_to_transform": (int, list, _NONE),
    "layers_pattern": (str, list, _NONE),
    "bias": (str,),
    "use_dora": (bool, _NONE),
    "use_rslora": (bool, _NONE),
    "lora_bias": (bool, _NONE),
    "fan_in_fan_out": (bool, _NONE),
}


def _is_odd(name: str, value: Any) -> bool:
    if name in ("r", "lora_alpha"):
        return isinstance(value, bool) or not value > 0
    if name == "bias":
        return value not in ("none", "all", "lora_only")
    if name in ("rank_pattern", "alpha_pattern") and value:
        return not all(isinstance(v, (int, float)) and v > 0 for v in value.values())
    if isinstance(value, list) and name != "layers_to_transform":
        return not all(isinstance(item, str) for item in value)
    return False


def _tensor_of(name: str, tensor: Tensor) -> tuple[AdapterTensor, str | None]:
    """Parse a tensor's name; return the tensor and the adapter's name, if the tensor's name has one."""
    path = ".".join(word for word in name.split(".") if word not in _WRAPPERS[1:])
    path = path.rpartition("base_model.model.")[2]
    if found := _PART.match(path):
        part = found["part"] + (".bias" if found["kind"] == "bias" else "")
        return AdapterTensor(name, found["module"].replace(".base_layer", ""), part, tensor), found["adapter"]
    saved = _SAVED.search(path)
    path = _SAVED.sub("", path).replace(".base_layer.", ".").replace(".original_module.", ".")
    return AdapterTensor(name, path, None, tensor), saved["adapter"] if saved else None


def _without_adapter_names(found: list[tuple[AdapterTensor, str | None]], file: Path) -> list[AdapterTensor]:
    adapters = sorted({adapter for _, adapter in found if adapter})
    if len(adapters) > 1:
        raise CheckpointError(
            f"{file} holds {len(adapters)} adapters ({', '.join(adapters)}); expected one. Save the one you "
            "need with save_pretrained(selected_adapters=[NAME])."
        )
    tensors = [tensor for tensor, _ in found]
    counts = Counter((tensor.module, tensor.part) for tensor in tensors if tensor.part)
    twice = [f"{module}.{part}" for (module, part), n in counts.items() if n > 1]
    if twice:
        raise CheckpointError(
            f"{file} holds more than one tensor for {names_in_short(twice)}. Save it again."
        )
    return tensors


def _check_numbers(tensors: list[AdapterTensor], file: Path) -> None:
    integers = [t.name for t in tensors if not t.tensor.is_floating_point()]
    if integers:
        raise CheckpointError(
            f"{file} stores {names_in_short(integers)} as integers, as in a quantized adapter, which is not "
            "supported. Save the adapter in FP32 or FP16."
        )
    wild = [t.name for t in tensors if not bool(torch.isfinite(t.tensor.float()).all())]
    if wild:
        raise CheckpointError(
            f"{file} holds values that are not finite, in {names_in_short(wild)}. Copy the adapter again, or "
            "use an earlier one."
        )
    paths = {t.module for t in tensors if t.part}
    parts = {module: {t.part for t in tensors if t.module == module and t.part} for module in paths}
    halves = [
        f"{module} has only {sorted(str(p) for p in found)}"
        for module, found in parts.items()
        if not ({"lora_A", "lora_B"} <= found or {"lora_embedding_A", "lora_embedding_B"} <= found)
    ]
    if halves:
        raise CheckpointError(
            f"{file} is incomplete: {names_in_short(halves)}. A LoRA module needs both of its matrices. "
            "Copy or save the adapter again."
        )
