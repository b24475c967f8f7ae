"""LoRA adapters, made and saved by peft: merged as peft computes them, or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import IMAGE, MRL_WIDTHS, N_TOKENS, read_json, tiny_checkpoint, write_json
from torch import Tensor, nn

from export import towers_from_checkpoint
from export.families.open_clip_checkpoint import checkpoint_from_folder
from export.towers import Towers
from runtime.errors import CheckpointError

Bases = Callable[[str], Path]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    root = tmp_path_factory.mktemp("bases")

    @cache
    def base(family: str) -> Path:
        return tiny_checkpoint(family, root / family)

    return base


@dataclass(frozen=True)
class Case:
    """An adapter: the family of its base, the module that it is made on, peft's options."""

    name: str
    family: str
    root: str
    options: Mapping[str, Any] = field(default_factory=dict)
    towers: tuple[str, ...] = ("text",)


def qv(**options: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **options}


NLLB = ["q_proj", "v_proj"]
BOTH = ("text", "image")
CASES = [
    Case("whole model", "capivara", "", qv()),
    Case("text tower", "capivara", "text", qv()),
    Case("transformer alone", "capivara", "text.transformer", qv()),
    Case("proj saved", "capivara", "text", qv(modules_to_save=["proj"])),
    Case("proj saved, whole model", "capivara", "", qv(modules_to_save=["text.proj"])),
    Case("rank pattern", "capivara", "text", qv(rank_pattern={r"layer\.1\.attention\.self\.query": 2})),
    Case("alpha pattern", "capivara", "text", qv(alpha_pattern={"query": 3})),
    Case("rsLoRA", "capivara", "text", qv(use_rslora=True, rank_pattern={"value": 9})),
    Case("DoRA", "capivara", "text", qv(use_dora=True)),
    Case("DoRA and rsLoRA", "capivara", "", qv(use_dora=True, use_rslora=True)),
    Case("all biases", "capivara", "text", qv(bias="all")),
    Case("LoRA biases", "capivara", "text", qv(bias="lora_only")),
    Case("bias of B", "capivara", "text", qv(lora_bias=True)),
    Case("fan in fan out", "capivara", "text", qv(fan_in_fan_out=True)),
    Case("all linear", "capivara", "text.transformer", qv(target_modules="all-linear")),
    Case("regular expression", "capivara", "", qv(target_modules=r"text\..*\.(query|dense)")),
    Case("some layers", "capivara", "text", qv(layers_to_transform=[1], layers_pattern="layer")),
    Case("excluded", "capivara", "text", qv(exclude_modules=r".*layer\.0\..*")),
    Case("token table", "capivara", "text", qv(target_modules=["word_embeddings", "key"])),
    Case("gaussian start", "capivara", "text", qv(init_lora_weights="gaussian")),
    Case("image tower", "capivara", "visual", qv(target_modules=["c_fc", "c_proj"]), ("image",)),
    Case("packed attention", "capivara", "visual", qv(target_modules=["attn"]), ("image",)),
    Case("patches", "capivara", "visual", qv(target_modules=["conv1"]), ("image",)),
    Case("both towers", "capivara", "", qv(target_modules=["query", "c_fc"]), BOTH),
    Case("nllb text", "nllb-clip", "text", qv(target_modules=NLLB)),
    Case("nllb whole", "nllb-clip", "", qv(target_modules=[*NLLB, "fc1", "mlp.c_fc"]), BOTH),
    Case("nllb token table", "nllb-clip", "text.transformer", qv(target_modules=["embed_tokens", *NLLB])),
    Case("nllb proj saved", "nllb-clip", "", qv(target_modules=NLLB, modules_to_save=["text.proj"])),
    Case("mrl text", "nllb-siglip-mrl", "text", qv(target_modules=NLLB)),
    Case("mrl whole", "nllb-siglip-mrl", "", qv(target_modules=[*NLLB, "qkv"]), BOTH),
    Case("first form", "nllb-clip-transformers", "", qv(target_modules=NLLB), BOTH),
    Case("first form text", "nllb-clip-transformers", "text_model.encoder", qv(target_modules=NLLB)),
    Case("altclip whole", "altclip", "", qv(target_modules=["query", "value", "q_proj"]), BOTH),
    Case("altclip text", "altclip", "text_model", qv(modules_to_save=["transformation"])),
    Case("altclip roberta", "altclip", "text_model.roberta", qv(bias="all")),
    Case("altclip saved", "altclip", "", qv(modules_to_save=["text_projection", "visual_projection"]), BOTH),
]  # fmt: skip
IDS = torch.randint(4, N_TOKENS, (3, 9), generator=torch.Generator().manual_seed(5))
IDS[1:, 6:] = 1
PIXELS = torch.randint(0, 256, (2, 3, IMAGE, IMAGE), generator=torch.Generator().manual_seed(6)).to(
    torch.uint8
)


def library_model(family: str, folder: Path) -> Any:
    if family == "altclip":
        from transformers import AltCLIPModel

        return AltCLIPModel.from_pretrained(str(folder), attn_implementation="eager")
    if family == "nllb-clip-transformers":
        return towers_from_checkpoint(folder).reference.model  # type: ignore[attr-defined]
    return checkpoint_from_folder(folder).model


@torch.inference_mode()
def library_vectors(model: Any, towers: Towers) -> dict[str, Tensor]:
    """Unit vectors of the library's own model, peft's layers and all."""
    mask = (IDS != 1).long()
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (towers.image_preprocessing.mean, towers.image_preprocessing.std)
    )
    pixels = (PIXELS / 255 - mean) / std
    if hasattr(model, "get_text_features"):
        found = (
            model.get_text_features(IDS, attention_mask=mask).pooler_output,
            model.get_image_features(pixels).pooler_output,
        )
    elif hasattr(model, "text_features"):
        found = model.text_features(IDS, mask), model.image_features(pixels)
    else:
        found = model.encode_text(IDS), model.encode_image(pixels)
    return dict(zip(BOTH, (nn.functional.normalize(v, dim=-1) for v in found), strict=True))


@torch.inference_mode()
def tower_vectors(towers: Towers) -> dict[str, Tensor]:
    mask = (IDS != 1).long()
    return {"text": towers.text(IDS, mask)[0], "image": towers.image(PIXELS)[0]}


def adapter(case: Case, base: Path, folder: Path, *, safe: bool = True) -> Any:
    """Make an adapter, train it with noise, save it. Returns the library's model with it, unmerged."""
    torch.manual_seed(3)
    model = library_model(case.family, base)
    root = model.get_submodule(case.root)
    adapted = peft.get_peft_model(root, peft.LoraConfig(**case.options))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            assert "lora_" in name or case.options.keys() & {"modules_to_save", "bias"}
    adapted.save_pretrained(str(folder), safe_serialization=safe)
    return model.eval()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_adapter_is_merged_as_peft_computes_it(case: Case, bases: Bases, tmp_path: Path) -> None:
    base = bases(case.family)
    model = adapter(case, base, tmp_path / "adapter", safe=len(case.name) % 2 == 0)
    plain, towers = towers_from_checkpoint(base), towers_from_checkpoint(tmp_path / "adapter", base=base)
    expected, found, before = library_vectors(model, towers), tower_vectors(towers), tower_vectors(plain)
    for tower in BOTH:
        torch.testing.assert_close(found[tower], expected[tower], atol=2e-6, rtol=0)
        moved = float((found[tower] - before[tower]).abs().max())
        assert moved > 1e-3 if tower in case.towers else moved == 0
    assert towers.fingerprint != plain.fingerprint
    assert (towers.family, towers.licence, towers.languages) == (plain.family, plain.licence, plain.languages)
    assert towers.mrl_dims == plain.mrl_dims == (MRL_WIDTHS if "mrl" in case.family else ())
    assert towers.source == {**plain.source, "adapter": "adapter", "base": base.name}
    unmerged = towers.reference.text_vectors(IDS.numpy())[towers.dim]
    torch.testing.assert_close(torch.from_numpy(unmerged), expected["text"], atol=2e-6, rtol=0)
    assert any("lora" in name for name, _ in named_modules_of(towers))


def named_modules_of(towers: Towers) -> list[tuple[str, nn.Module]]:
    reference: Any = towers.reference
    parts = [reference.model] if hasattr(reference, "model") else [reference.text, reference.visual]
    return [found for part in parts for found in part.named_modules()]


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


START = "base_model.model."
WRAPPERS = {
    "DataParallel within": lambda name: name.replace(START, f"{START}module."),
    "DataParallel around": lambda name: f"module.{name}",
    "compiled": lambda name: name.replace(START, f"{START}_orig_mod."),
    "Lightning": lambda name: name.replace(START, f"{START}model.model."),
    "sharded": lambda name: name.replace(".layer.", "._fsdp_wrapped_module.layer."),
    "bare names": lambda name: name.removeprefix(START),
    "named adapter": lambda name: name.replace(".weight", ".pt_br.weight") if "lora_" in name else name,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("root", ["", "text", "text.transformer"])
def test_wrapped_names_lead_to_the_same_place(wrapper: str, root: str, bases: Bases, tmp_path: Path) -> None:
    case = Case("", "capivara", root, qv(alpha_pattern={"value": 2}))
    model = adapter(case, bases("capivara"), tmp_path)
    renamed(tmp_path, WRAPPERS[wrapper])
    towers = towers_from_checkpoint(tmp_path, base=bases("capivara"))
    torch.testing.assert_close(
        tower_vectors(towers)["text"], library_vectors(model, towers)["text"], atol=2e-6, rtol=0
    )


def test_altclip_adapters_of_older_transformers_are_read(bases: Bases, tmp_path: Path) -> None:
    case = Case("", "altclip", "text_model", qv())
    model = adapter(case, bases("altclip"), tmp_path)
    renamed(tmp_path, lambda name: name.replace("encoder.layers.", "encoder.layer."))
    towers = towers_from_checkpoint(tmp_path, base=bases("altclip"))
    torch.testing.assert_close(
        tower_vectors(towers)["text"], library_vectors(model, towers)["text"], atol=2e-6, rtol=0
    )


def test_a_whole_state_dict_of_peft_is_read(bases: Bases, tmp_path: Path) -> None:
    torch.manual_seed(3)
    case = Case("", "capivara", "text", qv(modules_to_save=["proj"]))
    model = adapter(case, bases("capivara"), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    state = {f"base_model.model.{name}": tensor for name, tensor in model.text.state_dict().items()}
    torch.save(state, tmp_path / "adapter_model.bin")
    towers = towers_from_checkpoint(tmp_path, base=bases("capivara"))
    torch.testing.assert_close(
        tower_vectors(towers)["text"], library_vectors(model, towers)["text"], atol=2e-6, rtol=0
    )


def edit_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return edit


def configure(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        write_json(path, {**read_json(path), **changes})

    return edit


def without(part: str) -> Callable[[Path], None]:
    return edit_tensors(lambda state: {k: v for k, v in state.items() if part not in k})


def scaled(part: str, factor: float) -> Callable[[Path], None]:
    return edit_tensors(lambda state: {k: v * factor if part in k else v for k, v in state.items()})


REFUSED = {
    "no tensor": (edit_tensors(lambda state: {}), "holds no LoRA tensor"),
    "other tensors": (edit_tensors(lambda state: {"x": torch.ones(1)}), "holds no LoRA tensor.*found x"),
    "B left out": (without("layer.1.attention.self.query.lora_B"), r"layer\.1.*has only \['lora_A'\]"),
    "A left out": (without("layer.0.attention.self.value.lora_A"), r"layer\.0.*has only \['lora_B'\]"),
    "a layer left out": (without("layer.1."), r"requires 10 tensors, and 4 are missing \(.*layer\.1"),
    "saved module left out": (without("proj.2"), r"1 are missing|peft reports.*proj\.2"),
    "B zero": (scaled("lora_B", 0.0), None),
    "not finite": (scaled("lora_B", float("nan")), "not finite"),
    "a tensor too many": (
        edit_tensors(lambda s: {**s, START + "transformer.embeddings.LayerNorm.bias": torch.ones(16)}),
        "does not describe.*LayerNorm",
    ),
    "unknown module": (
        edit_tensors(lambda s: {k.replace("self.query", "self.asker"): v for k, v in s.items()}),
        "4 of 10 tensors have no matching module.*asker",
    ),
    "other width": (
        edit_tensors(lambda s: {k: v[..., :12].contiguous() if "lora_A" in k else v for k, v in s.items()}),
        "does not fit its base",
    ),
    "integers": (edit_tensors(lambda s: {k: (v * 9).to(torch.int8) for k, v in s.items()}), "quantized"),
    "LoHa": (configure(peft_type="LOHA"), "type 'LOHA'"),
    "IA3": (configure(peft_type="IA3"), "type 'IA3'"),
    "prompt tuning": (configure(peft_type="PROMPT_TUNING"), "type 'PROMPT_TUNING'"),
    "AdaLoRA": (configure(peft_type="ADALORA"), "type 'ADALORA'"),
    "no type": (configure(peft_type=None), "type None"),
    "PiSSA": (configure(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "unknown option": (configure(rotate_by=3), "sets rotate_by=3"),
    "QA-LoRA": (configure(use_qalora=True), "use_qalora=True"),
    "token rows": (configure(trainable_token_indices=[3]), "trainable_token_indices"),
    "replicated layers": (configure(layer_replication=[[0, 2]]), "layer_replication"),
    "another rank": (configure(r=2), "does not fit its base|has rank 4"),
    "rank of a word": (configure(r="four"), "r='four'"),
    "no rank": (configure(r=None), "r=None"),
    "bias of a kind": (configure(bias="some"), "bias='some'"),
    "no targets": (configure(target_modules=None), "names no target_modules"),
    "more targets": (configure(target_modules=["query", "value", "key"]), "requires 14 .* 4 are missing"),
    "fewer targets": (configure(target_modules=["query"]), "does not describe.*value"),
    "DoRA unasked": (configure(use_dora=True), "lora_magnitude_vector|are missing"),
    "no weights": (lambda at: (at / "adapter_model.safetensors").unlink(), "holds no adapter weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_named(name: str, bases: Bases, tmp_path: Path) -> None:
    adapter(Case("", "capivara", "text", qv(modules_to_save=["proj"])), bases("capivara"), tmp_path)
    change, message = REFUSED[name]
    change(tmp_path)
    if message is None:  # proj was trained and still moves the vectors
        without_proj = Case("", "capivara", "text", qv())
        adapter(without_proj, bases("capivara"), tmp_path)
        change(tmp_path)
        message = "changes no vector of its base: its matrices are zero"
    with pytest.raises(CheckpointError, match=message) as caught:
        towers_from_checkpoint(tmp_path, base=bases("capivara"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 5, 200])
@pytest.mark.parametrize("safe", [True, False])
def test_a_damaged_adapter_file_is_named(cut: int, safe: bool, bases: Bases, tmp_path: Path) -> None:
    adapter(Case("", "capivara", "text", qv()), bases("capivara"), tmp_path, safe=safe)
    file = next(tmp_path.glob("adapter_model.*"))
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="does not fit its base"):
        towers_from_checkpoint(tmp_path, base=bases("capivara"))


def test_an_adapter_of_another_family_is_refused(bases: Bases, tmp_path: Path) -> None:
    adapter(Case("", "nllb-clip", "text", qv(target_modules=NLLB)), bases("nllb-clip"), tmp_path)
    with pytest.raises(CheckpointError, match="tensors have no matching module"):
        towers_from_checkpoint(tmp_path, base=bases("capivara"))


def test_both_licences_are_told(bases: Bases, tmp_path: Path) -> None:
    adapter(Case("", "nllb-clip", "text", qv(target_modules=NLLB)), bases("nllb-clip"), tmp_path)
    assert towers_from_checkpoint(tmp_path, base=bases("nllb-clip")).licence == "CC-BY-NC-4.0"
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\nlicense: apache-2.0\n---\n")
    towers = towers_from_checkpoint(tmp_path, base=bases("nllb-clip"))
    assert towers.licence == "CC-BY-NC-4.0 (base), apache-2.0 (adapter)"


def test_the_base_of_an_adapter(bases: Bases, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapter(Case("", "capivara", "text", qv()), bases("capivara"), folder)
    with pytest.raises(CheckpointError, match="--base FOLDER"):
        towers_from_checkpoint(folder)
    configure(base_model_name_or_path=str(bases("capivara")))(folder)
    expected = towers_from_checkpoint(folder).fingerprint
    shutil.copytree(bases("capivara"), tmp_path / "base")
    configure(base_model_name_or_path="../base")(folder)
    assert towers_from_checkpoint(folder).fingerprint == expected
    with pytest.raises(CheckpointError, match="itself a LoRA adapter"):
        towers_from_checkpoint(folder, base=shutil.copytree(folder, tmp_path / "second"))
    with pytest.raises(CheckpointError, match="is not a LoRA adapter"):
        towers_from_checkpoint(bases("capivara"), base=bases("capivara"))


def test_an_adapter_that_fits_in_two_places_is_refused(bases: Bases, tmp_path: Path) -> None:
    """Each block of the image tower has an ``mlp.c_fc``; nothing says which one is meant."""
    case = Case("", "capivara", "visual.transformer.resblocks.1", qv(target_modules=["c_fc"]))
    adapter(case, bases("capivara"), tmp_path)
    with pytest.raises(CheckpointError, match=r"in 2 places \(visual.transformer.resblocks.0, "):
        towers_from_checkpoint(tmp_path, base=bases("capivara"))


def test_a_change_smaller_than_rounding_is_refused(bases: Bases, tmp_path: Path) -> None:
    adapter(Case("", "capivara", "text", qv()), bases("capivara"), tmp_path)
    scaled("lora_B", 1e-7)(tmp_path)
    with pytest.raises(CheckpointError, match=r"no more than rounding|changes no vector"):
        towers_from_checkpoint(tmp_path, base=bases("capivara"))


def test_a_wrong_merge_is_caught(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import export.weights.adapter_merge as module

    adapter(Case("", "capivara", "text", qv()), bases("capivara"), tmp_path)
    right = module._scale
    monkeypatch.setattr(module, "_scale", lambda *given: 1.01 * right(*given))
    with pytest.raises(CheckpointError, match="changed its text vectors by"):
        towers_from_checkpoint(tmp_path, base=bases("capivara"))
