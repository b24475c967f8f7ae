"""The fingerprint: another one for every change that moves vectors, the same for every re-export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_models import CHECKPOINTS, NAMES, ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from export import towers_from_checkpoint
from export.fingerprint.double_precision import in_double
from export.fingerprint.fingerprints import STEP, FixedInputs, behaviour_vectors, exact_positions
from export.towers import Towers
from runtime.errors import CheckpointError

Edit = Callable[[Path], None]


def edit(name: str, *path: str, **changes: Any) -> Edit:
    """Change keys of a JSON file, below ``path``; ``None`` removes one."""

    def apply(folder: Path) -> None:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        target = data
        for key in path:
            target = target[key]
        target.update({key: value for key, value in changes.items() if value is not None})
        for key in [key for key, value in changes.items() if value is None]:
            target.pop(key, None)
        (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")

    return apply


def text(**changes: Any) -> Edit:
    return edit("config.json", **changes)


def model(**changes: Any) -> Edit:
    return edit("open_clip_config.json", "model_cfg", **changes)


def vision(**changes: Any) -> Edit:
    return edit("open_clip_config.json", "model_cfg", "vision_cfg", **changes)


def pooling(**changes: Any) -> Edit:
    return edit("open_clip_config.json", "model_cfg", "text_cfg", **changes)


def pixels(**changes: Any) -> Edit:
    return edit("open_clip_config.json", "preprocess_cfg", **changes)


def added_token(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["added_tokens"][-1]["lstrip"] = not data["added_tokens"][-1]["lstrip"]
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def one_weight(name: str, key: str) -> Edit:
    """Change one value of a row that no probe has."""

    def apply(folder: Path) -> None:
        state = load_file(folder / name)
        state[key][20_011, 3] += 0.25
        save_file(state, folder / name, metadata={"format": "pt"})

    return apply


def swapped(name: str, one: str, other: str) -> Edit:
    def apply(folder: Path) -> None:
        state = load_file(folder / name)
        state[one], state[other] = state[other].clone(), state[one].clone()
        save_file(state, folder / name, metadata={"format": "pt"})

    return apply


OPEN_CLIP: dict[str, Edit] = {
    "quick_gelu": model(quick_gelu=True),
    "image heads": vision(head_width=64),
    "average pool": vision(pool_type="avg"),
    "image eps": vision(norm_kwargs={"eps": 1e-3}),
    "mean": pixels(mean=[0.5, 0.5, 0.5]),
    "std": pixels(std=[0.5, 0.5, 0.5]),
    "squash": pixels(resize_mode="squash"),
    "bilinear": pixels(interpolation="bilinear"),
    "context": pooling(context_length=64),
    "normaliser": edit("tokenizer.json", normalizer={"type": "Lowercase"}),
    "added token": added_token,
}
CHANGES: dict[str, dict[str, Edit]] = {
    "capivara": {
        **OPEN_CLIP,
        "hidden_act relu": text(hidden_act="relu"),
        "hidden_act gelu_new": text(hidden_act="gelu_new"),
        "eps": text(layer_norm_eps=1e-12),
        "text heads": text(num_attention_heads=2),
        "padding": text(pad_token_id=3),
        "cls pooler": pooling(hf_pooler_type="cls_last_hidden_state_pooler"),
        "token row": one_weight(
            "open_clip_model.safetensors", "text.transformer.embeddings.word_embeddings.weight"
        ),
        "layers swapped": swapped(
            "open_clip_model.safetensors",
            "text.transformer.encoder.layer.0.attention.self.key.weight",
            "text.transformer.encoder.layer.1.attention.self.key.weight",
        ),
        "truncation side": edit("tokenizer_config.json", truncation_side="left"),
    },
    "nllb-clip": {
        "scale_embedding": text(scale_embedding=False),
        "activation": text(activation_function="gelu"),
        "text heads": text(encoder_attention_heads=2),
        "mean pooler": pooling(hf_pooler_type="mean_pooler"),
        "context": pooling(context_length=100),
    },
    "nllb-siglip-mrl": {
        "no heads": text(mrl_resolutions=None),
        "fewer heads": text(mrl_resolutions=[32, 128]),
        "shortest": edit("config.json", "preprocess_cfg", resize_mode="shortest"),
        "image heads": edit("timm/config.json", "model_args", num_heads=3),
        "image activation": edit("timm/config.json", "model_args", act_layer="relu"),
    },
    "altclip": {
        "text activation": edit("config.json", "text_config", hidden_act="relu"),
        "image activation": edit("config.json", "vision_config", hidden_act="quick_gelu"),
        "text heads": edit("config.json", "text_config", num_attention_heads=2),
        "image heads": edit("config.json", "vision_config", num_attention_heads=3),
        "text eps": edit("config.json", "text_config", layer_norm_eps=1e-12),
        "image eps": edit("config.json", "vision_config", layer_norm_eps=1e-6),
        "mean": edit("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
        "resample": edit("preprocessor_config.json", resample=2),
        "rescale": edit("preprocessor_config.json", rescale_factor=0.01),
    },
}
EQUALS: dict[str, dict[str, Edit]] = {
    "capivara": {
        "unrelated keys": text(
            torch_dtype="float32", transformers_version="4.30.0", use_cache=False, note="x"
        ),
        "dropout": text(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "other open_clip": pixels(fill_color=0),
        "mean as float32": pixels(mean=[float(np.float32(m)) for m in (0.48145466, 0.4578275, 0.40821073)]),
        "tokenizer sections": edit(
            "tokenizer.json",
            truncation={"direction": "Right", "max_length": 77, "strategy": "LongestFirst", "stride": 0},
            decoder=None,
        ),
    },
    "altclip": {
        "sizes as numbers": edit("preprocessor_config.json", size=64, crop_size=64),
        "unrelated keys": edit("config.json", torch_dtype="float16", transformers_version="4.28.0"),
    },
}


def copied(name: str, folder: Path, *edits: Edit) -> Path:
    target = Path(shutil.copytree(CHECKPOINTS / name, folder / name))
    for apply in edits:
        apply(target)
    return target


@cache
def sample(name: str) -> Towers:
    return towers_from_checkpoint(CHECKPOINTS / name)


def vectors_of(towers: Towers) -> list[np.ndarray]:
    inputs = FixedInputs.of(towers.text, towers.text_preprocessing, towers.image_preprocessing)
    return list(behaviour_vectors(towers.text, towers.image, inputs))


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_has_a_fingerprint_of_its_own(name: str, tmp_path: Path) -> None:
    found = {"as it is": sample(name).fingerprint}
    for what, apply in CHANGES[name].items():
        try:
            found[what] = towers_from_checkpoint(copied(name, tmp_path / what, apply)).fingerprint
        except CheckpointError as error:
            found[what] = f"refused: {error}"
    same = {print_: [what for what in found if found[what] == print_] for print_ in found.values()}
    assert [whats for whats in same.values() if len(whats) > 1] == []
    assert sum(print_.startswith("bt2-") for print_ in found.values()) > len(found) - 3, found


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, edits in EQUALS.items() for what in edits])
def test_what_moves_no_vector_changes_no_fingerprint(name: str, what: str, tmp_path: Path) -> None:
    towers = towers_from_checkpoint(copied(name, tmp_path, EQUALS[name][what]))
    assert towers.fingerprint == sample(name).fingerprint


def in_half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["capivara", "nllb-clip"])
def test_storage_changes_no_fingerprint(name: str, tmp_path: Path) -> None:
    half = in_half(load_file(CHECKPOINTS / name / "open_clip_model.safetensors"))
    found = []
    for suffix, state in (("half", half), ("full", {k: v.float() for k, v in half.items()})):
        folder = copied(name, tmp_path / suffix)
        save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
        found.append(towers_from_checkpoint(folder).fingerprint)
        (folder / "open_clip_model.safetensors").unlink()
        torch.save(dict(reversed(state.items())), folder / "open_clip_pytorch_model.bin")
        found.append(towers_from_checkpoint(folder).fingerprint)
    assert len(set(found)) == 1


SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "no vectors": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"},
}
SCRIPT = """
import json, sys
from export import towers_from_checkpoint
print(json.dumps({n: towers_from_checkpoint("samples/checkpoints/" + n).fingerprint for n in sys.argv[1:]}))
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_processors_and_threads_change_no_fingerprint(setting: str) -> None:
    environment = {**os.environ, **SETTINGS[setting], "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *NAMES], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    assert json.loads(done.stdout) == {name: sample(name).fingerprint for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_far_finer_than_the_step(name: str) -> None:
    towers = sample(name)
    inputs = FixedInputs.of(towers.text, towers.text_preprocessing, towers.image_preprocessing)
    together = list(behaviour_vectors(towers.text, towers.image, inputs))
    assert all(found.dtype == np.float64 for found in together)
    rows = tuple((ids[i : i + 1], mask[i : i + 1]) for ids, mask in inputs.tokens for i in range(len(ids)))
    alone = list(behaviour_vectors(towers.text, towers.image, FixedInputs(rows, inputs.pixels)))
    n_heads = len(towers.dims)
    batched = [row[None] for h in range(0, 2 * n_heads, n_heads) for row in together[h]]
    apart = [np.abs(a - b).max() for a, b in zip(alone[::n_heads][: len(rows)], batched, strict=True)]
    assert max(apart) < STEP * 1e-8


class Narrow(TorchDispatchMode):
    """Notes operations that leave a float narrower than float64, beneath every other mode."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.float16)
            for x in tree_leaves(made)
        ):
            self.found.add(str(func))
        return made


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_computed_in_less_than_double(name: str) -> None:
    towers = sample(name)  # read before: the mode notes operations of reading, too
    with Narrow() as narrow:
        assert all(np.isfinite(found).all() for found in vectors_of(towers))
    assert narrow.found <= {"aten.embedding.default"}


def test_casts_to_float32_stay_in_double() -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    with in_double():
        found = [
            third.float(),
            third.to(torch.float32) * 1,
            torch.softmax(third, 0, dtype=torch.float32) / 3,
            torch.nn.functional.linear(third, torch.ones(1, 1), torch.zeros(1)),
            torch.nn.functional.conv2d(third.view(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.zeros(1)),
        ]
    assert [value.dtype for value in found] == [torch.float64] * len(found)
    assert [float(value) for value in found] == [1 / 3] * len(found)


def test_sinusoids_are_exact_and_learned_positions_are_kept() -> None:
    table = exact_positions(sample("nllb-clip").text)
    assert table is not None
    assert table.dtype == torch.float64
    stored = sample("nllb-clip").text.encoder.get_buffer("positions")
    assert 0 < float((stored.double() - table).abs().max()) < 1e-3
    assert exact_positions(sample("capivara").text) is None


GOLDEN = {
    "nllb-clip": "bt2-d4409f831c3cf5c50759123ce451d6c0",
    "nllb-siglip-mrl": "bt2-a418626ace2b3234ccff05e13e67d83a",
    "capivara": "bt2-f08d79c765d6e94fbdf29892ee32fe61",
    "capivara-lora": "bt2-b1e7921680f1672c68a16ba179e68777",
    "altclip": "bt2-ae9d43fa373d8f8e759958f2a8fce102",
}


@pytest.mark.parametrize("name", NAMES)
def test_fingerprints_are_those_of_other_machines_and_versions(name: str) -> None:
    """Written once; a change of a recipe, a probe text or a rounding step shows here."""
    assert sample(name).fingerprint == GOLDEN[name]
