"""What the exporter writes: a repository that Triton reads, and never half of one."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from google.protobuf import text_format
from sample_models import CHECKPOINTS, NAMES, Exported
from small_exports import QUICK
from stock_backends import require_accepted
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

from export import onnx_graph, repository_from_checkpoint
from export import repository as repository_module
from export.onnx_graph import IR_VERSION, OPSET
from runtime import Encoder
from runtime.commands.app import app
from runtime.errors import ExportError, ManifestError, ParityError
from runtime.manifest import Manifest, Modality, Precision
from runtime.repository_lock import LOCK_FILE

SAMPLE = CHECKPOINTS / "capivara"


@pytest.mark.parametrize("name", NAMES)
def test_triton_finds_models_only(name: str, exported: Exported) -> None:
    model = exported(name)
    for folder in (p for p in model.parent.iterdir() if p.is_dir()):
        config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert config.name == folder.name
        assert (folder / "1" / config.default_model_filename).is_file()


@pytest.mark.parametrize("modality", Modality)
@pytest.mark.parametrize("name", NAMES)
def test_configs_fit_their_graphs(name: str, modality: Modality, exported: Exported) -> None:
    model = exported(name)
    manifest = Manifest.read(model)
    tower = manifest.variant(Precision.FP32).tower(modality)
    folder = model.parent / tower.model
    graph = onnx.load(folder / "1" / tower.graph)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert [i.name for i in config.input] == [i.name for i in graph.graph.input] == list(tower.inputs)
    outputs = list(tower.outputs.values())
    assert [o.name for o in config.output] == [o.name for o in graph.graph.output] == outputs
    assert [list(o.dims) for o in config.output] == [[int(dim)] for dim in tower.outputs]
    assert require_accepted(folder) == config
    assert config.HasField("dynamic_batching") is (modality is Modality.IMAGE)  # texts come batched
    onnx.checker.check_model(graph, full_check=True)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", OPSET)]
    assert graph.ir_version == IR_VERSION <= 10
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert metadata["babeltower.fingerprint"] == manifest.fingerprint
    assert metadata["babeltower.modality"] == modality.value
    assert str(Path.cwd()) not in str(graph)[:200_000]


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_says_what_was_measured(name: str, exported: Exported) -> None:
    manifest = Manifest.read(exported(name))
    variant = manifest.variant(Precision.FP32)
    assert variant.parity["token_ids_equal"] is True
    assert variant.parity["max_pixel_error"] <= 1 / 255
    assert set(variant.versions) >= {"torch", "onnxruntime", "transformers"}
    for figures in variant.parity["engines"].values():
        assert len(figures["languages"]) >= 106
        assert figures["text"]["min_cosine"] >= 0.999999
        assert figures["image"]["max_abs_error"] <= 1e-5
    manifest.verify(exported(name).parent, variant)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "EXTERNAL_DATA_OVER_BYTES", 1 << 20)
    done = repository_from_checkpoint(SAMPLE, tmp_path / "repository", name="split", options=QUICK)
    data = sorted(p.name for p in tmp_path.rglob("*.data"))
    assert data == ["split_image_tower_fp32.data", "split_text_tower_fp32.data"]
    towers = [done.manifest.variants["fp32"].tower(modality) for modality in Modality]
    listed = [record.path for tower in towers for record in tower.files]
    assert sum(path.endswith(".data") for path in listed) == 2
    with Encoder.open(done.model) as encoder:
        assert encoder.embed_texts(["gato"]).shape == (1, encoder.dim)


def test_a_name_is_not_taken_twice(exported: Exported) -> None:
    model = exported("capivara")
    with pytest.raises(ExportError, match="--replace"):
        repository_from_checkpoint(SAMPLE, model.parent, name="capivara")


def test_replacing_leaves_one_whole_model(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    first = repository_from_checkpoint(SAMPLE, repository, name="m", options=QUICK)
    second = repository_from_checkpoint(
        CHECKPOINTS / "altclip", repository, name="m", options=replace(QUICK, replace=True)
    )
    assert first.manifest.fingerprint != second.manifest.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["repository"]
    with Encoder.open(repository / "m") as encoder:
        assert encoder.fingerprint == second.manifest.fingerprint


def test_a_model_that_disagrees_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = repository_module.towers_from_checkpoint

    def disturbed(*args: object, **kwargs: object) -> object:
        towers = honest(*args, **kwargs)  # type: ignore[arg-type]
        block = towers.text.encoder.get_submodule("blocks.1")
        block.down = copy.deepcopy(block.down)  # else the reference would be disturbed too
        block.down.weight.data.mul_(1.02)
        return towers

    monkeypatch.setattr(repository_module, "towers_from_checkpoint", disturbed)
    with pytest.raises(ParityError, match=r"does not agree with PyTorch.*text: error"):
        repository_from_checkpoint(SAMPLE, tmp_path / "repository", options=QUICK)
    kept = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert kept == ["capivara.fp32.refused.json"]


def test_a_full_disk_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(repository_module, "onnx_from_tower", full)
    with pytest.raises(ExportError, match=r"No space left on device.*bytes free.*Nothing was published"):
        repository_from_checkpoint(SAMPLE, tmp_path / "repository")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_publishes_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    command = [
        sys.executable,
        "-m",
        "babeltower",
        "export",
        str(SAMPLE),
        str(repository),
        "--name",
        "m",
    ]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".repository.staging-*/m_text_tower_fp32")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in repository.iterdir()] == [LOCK_FILE]  # which nobody holds any more
    repository_from_checkpoint(SAMPLE, repository, name="m", options=QUICK)
    assert Encoder.open(repository / "m").dim > 0


def test_a_changed_file_is_refused(exported: Exported, tmp_path: Path) -> None:
    model = exported("capivara")
    repository = Path(shutil.copytree(model.parent, tmp_path / "repository"))
    graph = repository / "capivara_text_tower_fp32" / "1" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(bytes(content))
    with pytest.raises(ManifestError, match=r"capivara_text_tower_fp32.*sha256"):
        Encoder.open(repository / "capivara")
    graph.write_bytes(bytes(content[:1000]))
    with pytest.raises(ManifestError, match="1000 bytes"):
        Encoder.open(repository / "capivara")
    graph.unlink()
    with pytest.raises(ManifestError, match="missing"):
        Encoder.open(repository / "capivara")


def test_the_command_publishes_and_prints_a_record(tmp_path: Path) -> None:
    options = ["--name", "pt", "--texts-per-language", "1", "--captions-per-language", "4", "--json"]
    result = CliRunner().invoke(app, ["export", str(SAMPLE), str(tmp_path / "r"), *options])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["parity"]["fp32"]["token_ids_equal"] is True
    assert Manifest.read(tmp_path / "r" / "pt").fingerprint == record["fingerprint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder", "r"], "no checkpoint at"),
        ([str(SAMPLE), "r", "--name", "a/b"], "Invalid model name"),
        ([str(SAMPLE), "r", "--name", "a" * 300], "Invalid model name of 300 characters"),
        ([str(SAMPLE), "r", "--precision", "bf16", "--engine", "onnxruntime"], "bf16 is not supported"),
        ([str(SAMPLE), "r", "--context-length", "100000"], "Context length"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
