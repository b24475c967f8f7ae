"""Weight files in every shape that training code leaves, and damaged folders: read, or refused."""

from __future__ import annotations

import collections
import copy
import enum
import json
import os
import pathlib
import pickle
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    FAMILIES,
    MRL_WIDTHS,
    WIDTH,
    clip_processor,
    languages_of,
    read_json,
    tiny_checkpoint,
    write_json,
)
from torch import Tensor

from export import towers_from_checkpoint
from export.towers import Towers
from export.weights.pickles import Unread, objects_from_torch_file
from runtime.errors import CheckpointError

CopyOf = Callable[[str], Path]
State = dict[str, Tensor]
WEIGHTS = dict.fromkeys(("nllb-clip", "nllb-siglip-mrl", "capivara"), "open_clip_model.safetensors")


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("originals")
    return cache(lambda family: tiny_checkpoint(family, root / family))


@pytest.fixture(scope="session")
def fingerprints(originals: Callable[[str], Path]) -> Callable[[str], str]:
    return cache(lambda family: towers_from_checkpoint(originals(family)).fingerprint)


@pytest.fixture
def copy_of(tmp_path: Path, originals: Callable[[str], Path]) -> CopyOf:
    return lambda family: Path(shutil.copytree(originals(family), tmp_path / family))


def take_weights(folder: Path, family: str) -> State:
    """Remove a folder's weight file, and give its tensors."""
    file = folder / WEIGHTS.get(family, "model.safetensors")
    state = load_file(file)
    file.unlink()
    return state


# Formats


class Level(enum.Enum):
    HIGH = 1


class Settings(dict):  # type: ignore[type-arg]
    """A dict of another package, as Lightning's AttributeDict is."""


def foreign_hyperparameters() -> dict[str, Any]:
    """As OmegaConf keeps them, in modules that are gone when the file is read."""
    for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.base"):
        sys.modules[name] = types.ModuleType(name)
    made = {}
    for module, name in (("omegaconf.dictconfig", "DictConfig"), ("omegaconf.base", "ContainerMetadata")):
        kind = type(name, (), {"__module__": module, "__getstate__": lambda self: {"_content": {"lr": 1e-4}}})
        setattr(sys.modules[module], name, kind)
        made[name] = kind()
    return made


@pytest.fixture
def no_omegaconf() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith("omegaconf")]:
        del sys.modules[name]


def lightning(state: State, file: Path, *, zipped: bool = True) -> None:
    torch.save(
        {
            "epoch": 3,
            "pytorch-lightning_version": "2.0.9",
            "state_dict": collections.OrderedDict((f"model.model.{k}", v) for k, v in state.items()),
            "hyper_parameters": foreign_hyperparameters(),
            "callbacks": {
                "ModelCheckpoint": {"dirpath": pathlib.PurePosixPath("/data"), "best": torch.ones(1)}
            },
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
            "loops": collections.defaultdict(list, level=Level.HIGH, options=Settings(a=1), seen={1, 2}),
            "scale": np.float64(3.0),
        },
        file,
        _use_new_zipfile_serialization=zipped,
    )
    for name in [name for name in sys.modules if name.startswith("omegaconf")]:
        del sys.modules[name]


def training(state: State, file: Path) -> None:
    """As open_clip's training saves it, from DistributedDataParallel."""
    torch.save(
        {
            "epoch": 32,
            "name": "2023_10_01-model_xlm-roberta-base-ViT-B-32",
            "state_dict": {f"module.{k}": v for k, v in state.items()},
            "optimizer": {"state": {0: {"step": torch.tensor(9.0)}}, "param_groups": [{"lr": 1e-3}]},
            "scaler": {"scale": 65536.0},
        },
        file,
    )


def sharded(state: State, folder: Path, stem: str, suffix: str) -> None:
    names = sorted(state)
    halves = names[::2], names[1::2]
    places = {}
    for i, half in enumerate(halves, start=1):
        file = folder / f"{stem}-0000{i}-of-00002{suffix}"
        part = {name: state[name] for name in half}
        save_file(part, file) if suffix == ".safetensors" else torch.save(part, file)
        places |= dict.fromkeys(half, file.name)
    write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": places})


def stem_of(family: str) -> str:
    return "open_clip_model" if family in WEIGHTS else "model"


FORMATS: dict[str, Callable[[State, Path, str], object]] = {
    "another name": lambda state, at, family: save_file(state, at / "best.safetensors"),
    "pth": lambda state, at, family: torch.save(state, at / "clip.pth"),
    "pt": lambda state, at, family: torch.save({"model_state_dict": state, "step": 3}, at / "last.pt"),
    "torch of 2019": lambda s, at, f: torch.save(s, at / "old.bin", _use_new_zipfile_serialization=False),
    "open_clip training": lambda state, at, family: training(state, at / "epoch_latest.pt"),
    "Lightning": lambda state, at, family: lightning(state, at / "2kmj76gi.ckpt"),
    "Lightning of 2019": lambda state, at, family: lightning(state, at / "old.ckpt", zipped=False),
    "compiled": lambda s, at, f: save_file({f"_orig_mod.{k}": v for k, v in s.items()}, at / "c.safetensors"),
    "sharded safetensors": lambda state, at, family: sharded(state, at, stem_of(family), ".safetensors"),
    "sharded bin": lambda s, at, family: sharded(
        s, at, "open_clip_pytorch_model" if family in WEIGHTS else "pytorch_model", ".bin"
    ),
    "parameters": lambda s, at, f: torch.save({k: torch.nn.Parameter(v) for k, v in s.items()}, at / "p.pt"),
    "FP64": lambda s, at, f: save_file({k: v.double() for k, v in s.items()}, at / "wide.safetensors"),
    "beside a trainer's files": lambda state, at, family: (
        [torch.save({"lr": 1}, at / name) for name in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
        and save_file(state, at / "weights.safetensors")
    ),
}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "nllb-siglip-mrl"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_form_is_the_same_space(
    form: str, family: str, copy_of: CopyOf, fingerprints: Callable[[str], str], no_omegaconf: None
) -> None:
    folder = copy_of(family)
    FORMATS[form](take_weights(folder, family), folder, family)
    assert towers_from_checkpoint(folder).fingerprint == fingerprints(family)
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_widened(family: str, dtype: torch.dtype, copy_of: CopyOf) -> None:
    folder = copy_of(family)
    state = {name: tensor.to(dtype) for name, tensor in take_weights(folder, family).items()}
    file = folder / WEIGHTS.get(family, "model.safetensors")
    save_file(state, file)
    narrow = towers_from_checkpoint(folder).fingerprint
    save_file({name: tensor.float() for name, tensor in state.items()}, file)
    assert towers_from_checkpoint(folder).fingerprint == narrow


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_file_may_be_named(family: str, copy_of: CopyOf, fingerprints: Callable[[str], str]) -> None:
    folder = copy_of(family)
    file = folder / WEIGHTS.get(family, "model.safetensors")
    file.rename(folder / "epoch_9.safetensors")
    save_file({"x": torch.ones(1)}, folder / "epoch_8.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 weight files \(epoch_8|holds another kind of model"):
        towers_from_checkpoint(folder)
    assert towers_from_checkpoint(folder / "epoch_9.safetensors").fingerprint == fingerprints(family)


BUFFERS: dict[str, dict[str, Tensor]] = {
    "capivara": {
        "text.transformer.embeddings.position_ids": torch.arange(130)[None],
        "text.transformer.embeddings.token_type_ids": torch.zeros(1, 130, dtype=torch.int64),
    },
    "altclip": {
        "text_model.roberta.embeddings.position_ids": torch.arange(130)[None],
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.roberta.pooler.dense.weight": torch.randn(WIDTH, WIDTH),
        "text_model.roberta.pooler.dense.bias": torch.randn(WIDTH),
    },
    "nllb-clip-transformers": {"vision_model.embeddings.position_ids": torch.arange(5)[None]},
}


@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_of_older_versions_are_left_out(
    family: str, copy_of: CopyOf, fingerprints: Callable[[str], str]
) -> None:
    folder = copy_of(family)
    state = {**take_weights(folder, family), **BUFFERS[family]}
    state.pop("logit_scale", None)
    torch.save(state, folder / "weights.pt")
    assert towers_from_checkpoint(folder).fingerprint == fingerprints(family)


@pytest.mark.parametrize("family", ["nllb-clip", "nllb-clip-transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sinusoidal_positions_are_compared(
    family: str, dtype: torch.dtype, copy_of: CopyOf, fingerprints: Callable[[str], str]
) -> None:
    folder = copy_of(family)
    reference: Any = towers_from_checkpoint(folder).reference
    encoder = reference.text.transformer if family == "nllb-clip" else reference.model.text_model.encoder
    name = (
        "text.transformer" if family == "nllb-clip" else "text_model.encoder"
    ) + ".embed_positions.weights"
    state = {**take_weights(folder, family), name: encoder.embed_positions.weights.to(dtype)}
    torch.save(state, folder / "weights.pt")
    assert towers_from_checkpoint(folder).fingerprint == fingerprints(family)
    torch.save({**state, name: state[name] + 0.5}, folder / "weights.pt")
    with pytest.raises(CheckpointError, match="differ from those that this architecture computes"):
        towers_from_checkpoint(folder)


def test_a_whole_m2m100_gives_its_encoder(copy_of: CopyOf, fingerprints: Callable[[str], str]) -> None:
    folder, start = copy_of("nllb-clip"), "text.transformer."
    found = take_weights(folder, "nllb-clip")
    state = {k.replace(start, f"{start}encoder.") if start in k else k: v for k, v in found.items()}
    state |= {
        f"{start}shared.weight": found[f"{start}embed_tokens.weight"],
        f"{start}decoder.layers.0.fc1.weight": torch.randn(3, 3),
        f"{start}lm_head.weight": torch.randn(3, 3),
    }
    torch.save(state, folder / "weights.pt")
    assert towers_from_checkpoint(folder).fingerprint == fingerprints("nllb-clip")
    state[f"{start}shared.weight"] = torch.zeros(3)
    torch.save(state, folder / "weights.pt")
    with pytest.raises(CheckpointError, match="two different token tables"):
        towers_from_checkpoint(folder)


# Weights that are not consumed whole


def unlike(changes: Callable[[State], Mapping[str, Any]]) -> Callable[[Path, State], None]:
    return lambda folder, state: torch.save(dict(changes(state)), folder / "weights.pt")


REFUSED: dict[str, tuple[Callable[[Path, State], object], str]] = {
    "an EMA copy": (unlike(lambda s: {"state_dict": s, "state_dict_ema": s}), "2 sets of weights"),
    "EMA within": (unlike(lambda s: {**s, "ema.proj": s["visual.proj"]}), "ema.proj is unexpected"),
    "teacher and student": (
        unlike(lambda s: {f"{who}.{k}": v for who in ("teacher", "student") for k, v in s.items()}),
        "2 models, under 'student.', 'teacher.'",
    ),
    "another head": (unlike(lambda s: {**s, "head.weight": torch.ones(2)}), "head.weight is unexpected"),
    "a metric": (
        unlike(lambda s: {**{f"model.{k}": v for k, v in s.items()}, "acc.tp": torch.ones(1)}),
        "acc.tp is unexpected",
    ),
    "a tensor short": (
        unlike(lambda s: {k: v for k, v in s.items() if k != "visual.proj"}), "visual.proj is missing",
    ),
    "INT8": (unlike(lambda s: {k: v.to(torch.int8) for k, v in s.items()}), "stored as int8"),
    "odd positions": (
        unlike(lambda s: {**s, "text.transformer.embeddings.position_ids": torch.arange(130).flip(0)}),
        "values that differ",
    ),
    "an unmerged adapter": (
        unlike(lambda s: {**s, "text.base_model.model.q.lora_A.default.weight": s["logit_scale"]}),
        "unmerged LoRA adapter",
    ),
    "sparse": (unlike(lambda s: {**s, "visual.proj": s["visual.proj"].to_sparse()}), "not a mapping|sparse"),
    "a whole module": (unlike(lambda s: {"model": torch.nn.Linear(2, 2)}), "not a mapping of names to "
    "tensors"),
    "a list": (lambda at, s: torch.save(list(s.values()), at / "w.pt"), "holds list"),
    "nothing": (unlike(lambda s: {}), "none of its 0 tensors"),
    "TorchScript": (
        lambda at, s: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), at / "w.pt"), "TorchScript",
    ),
    "a Git LFS pointer": (
        lambda at, s: (at / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1"),
        "Git LFS pointer",
    ),
    "a page": (lambda at, s: (at / "w.bin").write_text("<!DOCTYPE html><html>404</html>"), "HTML page"),
    "an empty file": (lambda at, s: (at / "w.pt").write_bytes(b""), "is empty"),
    "NaN": (unlike(lambda s: {k: v * float("nan") for k, v in s.items()}), "not finite"),
    "another model": (unlike(lambda s: {"encoder.weight": torch.ones(2)}), "holds another kind of model"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_whole_is_refused(name: str, copy_of: CopyOf) -> None:
    folder = copy_of("capivara")
    write, message = REFUSED[name]
    write(folder, take_weights(folder, "capivara"))
    with pytest.raises(CheckpointError, match=message) as caught:
        towers_from_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stem", ["open_clip_model", "model"])
def test_shards_that_do_not_fit_are_named(stem: str, copy_of: CopyOf) -> None:
    family = "capivara" if stem == "open_clip_model" else "altclip"
    folder = copy_of(family)
    sharded(take_weights(folder, family), folder, stem, ".safetensors")
    first, index = folder / f"{stem}-00001-of-00002.safetensors", folder / f"{stem}.safetensors.index.json"
    save_file({**load_file(first), "extra": torch.ones(1)}, first)
    with pytest.raises(CheckpointError, match="extra is not listed"):
        towers_from_checkpoint(folder)
    first.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        towers_from_checkpoint(folder)
    write_json(index, {"weight_map": {"x": "../elsewhere.safetensors"}})
    with pytest.raises(CheckpointError, match="outside its folder"):
        towers_from_checkpoint(folder)


# Pickles


class Harm:
    """Runs a function with its arguments when a plain unpickler meets it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside the weights", "in the weights", "instead of them"])
@pytest.mark.parametrize("function", [os.system, eval, exec, os.mkdir, pathlib.Path.touch, shutil.copyfile])
def test_a_pickle_runs_nothing(
    function: Callable[..., Any], place: str, zipped: bool, copy_of: CopyOf, tmp_path: Path
) -> None:
    folder, mark = copy_of("capivara"), tmp_path / "harmed"
    state: dict[str, Any] = take_weights(folder, "capivara")
    args: dict[Any, tuple[Any, ...]] = {
        os.system: (f"touch {mark}",),
        os.mkdir: (str(mark),),
        pathlib.Path.touch: (mark,),
        shutil.copyfile: (__file__, str(mark)),
    }
    harm = Harm(function, *args.get(function, (f"open({str(mark)!r}, 'w')",)))
    data = {
        "beside the weights": {"state_dict": state, "hyper_parameters": harm},
        "in the weights": {**state, "visual.proj": harm},
        "instead of them": harm,
    }[place]
    file = folder / "weights.bin"
    torch.save(data, file, _use_new_zipfile_serialization=zipped)
    if place == "beside the weights" and function is pathlib.Path.touch:  # inert, and not among the weights
        assert towers_from_checkpoint(folder).family == "capivara"
    else:
        with pytest.raises(CheckpointError, match=r"would run code|not a mapping of names to tensors"):
            towers_from_checkpoint(folder)
    file.write_bytes(pickle.dumps(data))
    with pytest.raises(CheckpointError, match="would run code"):
        towers_from_checkpoint(folder)
    assert not mark.exists()


def test_stand_ins_have_no_behaviour(tmp_path: Path) -> None:
    values = {
        "path": Path("/x"),
        "level": Level.HIGH,
        "settings": Settings(a=1),
        "function": print,
        "numpy": np.ones(2),
    }
    torch.save({"weights": torch.ones(2), **values}, tmp_path / "file.pt")
    found = objects_from_torch_file(tmp_path / "file.pt")
    assert torch.equal(found.pop("weights"), torch.ones(2))
    assert all(isinstance(v, Unread) or issubclass(v, Unread) for v in found.values())


# Preprocessing and tokenizers


@pytest.mark.parametrize("family", ["nllb-clip", "capivara", "nllb-siglip-mrl"])
def test_open_clip_preprocessing_has_open_clip_s_defaults(family: str, copy_of: CopyOf) -> None:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    folder = copy_of(family)
    path = folder / ("config.json" if family == "nllb-siglip-mrl" else "open_clip_config.json")
    stated = {"mean": None, "resize_mode": "squash", "size": 224, "novelty": 3, "interpolation": "bilinear"}
    write_json(path, {**read_json(path), "preprocess_cfg": stated})
    if family == "nllb-siglip-mrl":
        other = folder / "open_clip_config.json"
        write_json(other, {**read_json(other), "preprocess_cfg": {}})
    found = towers_from_checkpoint(folder).image_preprocessing
    assert (found.mean, found.std) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    assert (found.resize, found.interpolation, found.height, found.width) == ("squash", "bilinear", 32, 32)


@pytest.mark.parametrize("family", ["altclip", "nllb-clip-transformers"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_clip_processors_of_both_transformers_are_read(family: str, file: str, copy_of: CopyOf) -> None:
    folder = copy_of(family)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    config = clip_processor()
    stated = {"image_processor": config, "processor_class": "AltCLIPProcessor"}
    write_json(folder / file, config if file.startswith("pre") else stated)
    assert towers_from_checkpoint(folder).image_preprocessing.mean == tuple(config["image_mean"])
    del config["image_mean"]
    write_json(folder / file, config if file.startswith("pre") else stated)
    assert towers_from_checkpoint(folder).image_preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", ["removed", "without class"])
def test_a_tokenizer_file_is_enough(
    family: str, change: str, copy_of: CopyOf, fingerprints: Callable[[str], str]
) -> None:
    folder = copy_of(family)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    path.unlink()
    if change == "without class":
        write_json(path, {key: value for key, value in config.items() if key != "tokenizer_class"})
    assert towers_from_checkpoint(folder).fingerprint == fingerprints(family)


# MRL heads


def test_heads_may_lie_with_the_towers(copy_of: CopyOf, fingerprints: Callable[[str], str]) -> None:
    folder = copy_of("nllb-siglip-mrl")
    heads = load_file(folder / "model.safetensors")
    towers = load_file(folder / "open_clip_model.safetensors")
    both = {**{f"model.{name}": tensor for name, tensor in towers.items()}, **heads}
    save_file(both, folder / "model.safetensors")  # as published, beside open_clip's own file
    assert towers_from_checkpoint(folder).fingerprint == fingerprints("nllb-siglip-mrl")
    save_file({**both, "model.visual.extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="two different models"):
        towers_from_checkpoint(folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="extra is unexpected"):
        towers_from_checkpoint(folder)
    save_file(both, folder / "model.safetensors")
    assert towers_from_checkpoint(folder).mrl_dims == MRL_WIDTHS
    assert towers_from_checkpoint(folder).fingerprint == fingerprints("nllb-siglip-mrl")


def test_heads_are_never_lost(copy_of: CopyOf) -> None:
    folder = copy_of("nllb-siglip-mrl")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "mrl_resolutions": [2]})
    with pytest.raises(CheckpointError, match=r"not in its mrl_resolutions .*\(4\.bias"):
        towers_from_checkpoint(folder)
    del config["mrl_resolutions"]
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match="the heads would be lost"):
        towers_from_checkpoint(folder)


# The author's first form


def test_the_first_form_of_nllb_clip_computes_what_its_code_says(copy_of: CopyOf) -> None:
    """Source: ``NLLBCLIPModel.get_text_features`` and ``get_image_features``."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, M2M100Config, M2M100Model

    folder = copy_of("nllb-clip-transformers")
    towers, config = towers_from_checkpoint(folder), read_json(folder / "config.json")
    state = load_file(folder / "model.safetensors")
    text = M2M100Model(M2M100Config(**{**config["text_config"], "decoder_layers": 1})).encoder.eval()
    text.load_state_dict({k[19:]: v for k, v in state.items() if k.startswith("text_model.encoder.")})
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**config["vision_config"])).eval()
    vision.load_state_dict({k: v for k, v in state.items() if k.startswith("vis")})
    ids = torch.from_numpy(towers.reference.token_ids(["um gato", "a"], ["por_Latn", "eng_Latn"]))
    mask = (ids != 1).long()
    with torch.inference_mode():
        hidden = text(input_ids=ids, attention_mask=mask).last_hidden_state
        norm = torch.nn.functional.layer_norm(
            hidden,
            (WIDTH,),
            state["text_model.final_layer_norm.weight"],
            state["text_model.final_layer_norm.bias"],
        )
        expected = torch.nn.functional.normalize(norm[:, 0] @ state["text_projection.weight"].T, dim=-1)
        torch.testing.assert_close(towers.text(ids, mask)[0], expected, atol=1e-6, rtol=0)
        pixels = torch.from_numpy(towers.reference.pixels(Image.new("RGB", (50, 40), (90, 9, 200))))[None]
        features = torch.nn.functional.normalize(vision(pixels).image_embeds, dim=-1)
    found = towers.reference.image_vectors(pixels.numpy())[towers.dim]
    torch.testing.assert_close(torch.from_numpy(found), features, atol=1e-6, rtol=0)


# Every key and every file, damaged


GONE = object()
BREAKAGES = {"gone": GONE, "null": None, "word": "word", "negative": -3, "list": []}


def key_paths(data: Mapping[str, Any], start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in data.items():
        yield (*start, key)
        if isinstance(value, dict):
            yield from key_paths(value, (*start, key))


def changed(data: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    new = copy.deepcopy(dict(data))
    place = new
    for key in path[:-1]:
        place = place[key]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return new


def check(folder: Path, family: str) -> str:
    """Read a damaged folder: towers that agree with the library, or one sentence."""
    towers, message = None, ""
    try:
        towers = towers_from_checkpoint(folder)
    except CheckpointError as error:
        message = str(error)
    if towers is None:
        assert "\n" not in message
        assert 40 < len(message) < 1200
        return "refused"
    assert_agreement(towers, family)
    return "read"


def assert_agreement(towers: Towers, family: str) -> None:
    ids = towers.reference.token_ids(["um gato", "a"], languages_of(family, 2))
    tokens = torch.from_numpy(ids)
    settings = towers.image_preprocessing
    raw = torch.randint(0, 256, (1, 3, settings.height, settings.width), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (settings.mean, settings.std))
    with torch.inference_mode():
        found = towers.text(tokens, (tokens != 1).long())[0].numpy(), towers.image(raw)[0].numpy()
    expected = (
        towers.reference.text_vectors(ids)[towers.dim],
        towers.reference.image_vectors(((raw / 255 - mean) / std).numpy())[towers.dim],
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


CONFIGS = [
    ("nllb-clip", "config.json"),
    ("nllb-clip", "open_clip_config.json"),
    ("nllb-clip", "tokenizer_config.json"),
    ("nllb-siglip-mrl", "config.json"),
    ("capivara", "open_clip_config.json"),
    ("altclip", "config.json"),
    ("altclip", "preprocessor_config.json"),
    ("altclip", "tokenizer_config.json"),
    ("nllb-clip-transformers", "config.json"),
]


@pytest.mark.parametrize("breakage", ["gone", "null", "other"])
@pytest.mark.parametrize(("family", "name"), CONFIGS)
def test_any_key_may_be_damaged(family: str, name: str, breakage: str, copy_of: CopyOf) -> None:
    """One test a file: a wrong kind of value is another for each key, in turn."""
    folder = copy_of(family)
    data = read_json(folder / name)
    others = [value for key, value in BREAKAGES.items() if key not in ("gone", "null")]
    ends = collections.Counter[str]()
    for i, path in enumerate(key_paths(data)):
        value = others[i % len(others)] if breakage == "other" else BREAKAGES[breakage]
        write_json(folder / name, changed(data, path, value))
        ends[check(folder, family)] += 1
    assert ends["read"] > 0
    assert ends["refused"] > 0 or (name, breakage) == ("tokenizer_config.json", "gone")


@pytest.mark.parametrize("damage", ["gone", "half", "empty", "a list"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_file_may_be_damaged(family: str, damage: str, copy_of: CopyOf) -> None:
    folder = copy_of(family)
    ends = collections.Counter[str]()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = file.read_bytes()
        new = {"half": content[: len(content) // 2], "empty": b"", "a list": b"[]"}
        file.unlink() if damage == "gone" else file.write_bytes(new[damage])
        ends[check(folder, family)] += 1
        file.write_bytes(content)
    assert ends["refused"] >= 3
    assert json.loads((folder / "config.json").read_text())
