"""A server answers with PyTorch's vectors or not at all, whatever is damaged and whatever runs its towers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from altered_models import computing_otherwise, copied, graph_of, of_before, overwritten, rerecorded
from sample_models import Exported

from export.triton.frontends import frontends_from_model
from runtime import Encoder
from runtime.errors import EngineError, ManifestError, OpeningCheckError
from runtime.manifest import Engine, Manifest, Modality, Precision
from runtime.opening.model_check import opening_path
from runtime.opening.probes import OpeningProbes
from runtime.server import Server, ServerEnvironment, ServerOptions, running_server
from runtime.server.checks import require_right_answers, verify_served_files
from runtime.triton_config import engine_of_tower
from triton_models.tower import TowerServer, tower_config_from_triton

NAME = "capivara"


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported(NAME)


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return copied(model, tmp_path / "own")


@pytest.fixture(scope="module")
def elsewhere(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that fit their checksums, and a text tower that computes otherwise here."""
    made = copied(model, tmp_path_factory.mktemp("elsewhere") / "r")
    return computing_otherwise(made, Modality.TEXT)


@pytest.fixture(scope="module")
def alone(
    model: Path, server_environment: ServerEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of the healthy model."""
    made = copied(model, tmp_path_factory.mktemp("alone") / "r")
    with running_server(made.parent, environment=server_environment) as server:
        yield server


def loaded(server: Server) -> set[str]:
    return {model["name"] for model in server.models()}


def test_overwritten_weights_are_refused_before_the_server_starts(
    own: Path, server_environment: ServerEnvironment
) -> None:
    overwritten(graph_of(own, Modality.IMAGE))
    command = [sys.executable, "-m", "babeltower", "serve", str(own.parent)]
    ports = [f"--{name}=0" for name in ("port", "grpc-port", "metrics-port")]
    done = subprocess.run(
        [*command, *ports, f"--env={server_environment.folder}"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "model.onnx has sha256" in done.stderr
    assert "grpc" not in done.stdout


@pytest.mark.parametrize("damage", ["front end", "tokenizer", "graph of no front end"])
def test_every_file_that_is_loaded_is_compared(damage: str, own: Path) -> None:
    verify_served_files(own.parent, None)
    folder = own.parent / f"{NAME}_text"
    path = {
        "front end": folder / "1" / "runtime" / "preprocessing" / "text.py",
        "tokenizer": folder / "1" / "tokenizer.json",
        "graph of no front end": graph_of(own, Modality.IMAGE),
    }[damage]
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ManifestError, match=path.name):
        verify_served_files(own.parent, None)
    verify_served_files(own.parent, [f"{NAME}_text_tower_fp32"])


def test_any_server_with_our_backends_refuses_a_tower_that_computes_otherwise(
    elsewhere: Path, server_environment: ServerEnvironment
) -> None:
    """Even one that compares nothing itself: the tower's folder carries its probes."""
    options = ServerOptions(verify=False, ready_s=60)
    with (
        pytest.raises(EngineError, match=f"{NAME}_text_tower_fp32 does not reproduce PyTorch's vectors"),
        running_server(elsewhere.parent, environment=server_environment, options=options),
    ):
        pass


@pytest.mark.parametrize("engine", [Engine.ONNXRUNTIME, Engine.OPENVINO])
def test_a_tower_checks_itself_when_it_is_loaded(engine: Engine, elsewhere: Path, model: Path) -> None:
    pytest.importorskip(engine.value)

    def opened(source: Path, modality: Modality) -> None:
        graph = graph_of(source, modality)
        tower = Manifest.read(source).variants["fp32"].tower(modality)
        vectors = [{"name": n, "data_type": "TYPE_FP32", "dims": [int(w)]} for w, n in tower.outputs.items()]
        size = Manifest.read(source).image
        inputs = (
            [{"name": n, "data_type": "TYPE_INT64", "dims": [-1]} for n in ("input_ids", "attention_mask")]
            if modality is Modality.TEXT
            else [{"name": "pixels", "data_type": "TYPE_UINT8", "dims": [3, size.height, size.width]}]
        )
        config = {
            "name": tower.model, "default_model_filename": graph.name, "max_batch_size": 8,
            "input": inputs, "output": vectors,
        }  # fmt: skip
        TowerServer(graph.parent, tower_config_from_triton(json.dumps(config), engine), engine).close()

    for modality in Modality:
        opened(model, modality)
    opened(elsewhere, Modality.IMAGE)
    with pytest.raises(OpeningCheckError, match=f"{NAME}_text_tower_fp32"):
        opened(elsewhere, Modality.TEXT)


def test_a_right_server_is_found_right_by_every_way_of_asking(alone: Server, model: Path) -> None:
    require_right_answers(alone.addresses.http_url, model.parent, loaded(alone))
    towers = {name for name in loaded(alone) if "_tower_" in name}
    assert towers == {f"{NAME}_{modality.value}_tower_fp32" for modality in Modality}
    require_right_answers(alone.addresses.http_url, model.parent, towers)


@pytest.mark.parametrize("modality", Modality)
@pytest.mark.parametrize("asks_front_ends", [True, False])
def test_a_backend_that_checks_nothing_is_asked_through_the_server(
    asks_front_ends: bool, modality: Modality, alone: Server, own: Path
) -> None:
    """The server's vectors are not those that the repository expects, as a stock backend's may be."""
    path = opening_path(own.parent, Manifest.read(own).variants["fp32"].tower(modality))
    probes = OpeningProbes.read(path)
    rolled = {name: vectors[::-1].copy() for name, vectors in probes.vectors.items()}
    dataclasses.replace(probes, vectors=rolled).save(path)
    names = {name for name in loaded(alone) if asks_front_ends or "_tower_" in name}
    asked = f"{NAME}_{modality.value}" if asks_front_ends else f"{NAME}_{modality.value}_tower_fp32"
    with pytest.raises(OpeningCheckError, match=f"The server's {asked} does not reproduce") as error:
        require_right_answers(alone.addresses.http_url, rerecorded(own).parent, names)
    assert error.value.tower == asked


def test_a_model_of_before_is_served_and_asked(own: Path, server_environment: ServerEnvironment) -> None:
    of_before(own)
    with running_server(own.parent, environment=server_environment) as server:
        assert {m["state"] for m in server.models()} == {"READY"}
    computing_otherwise(own, Modality.TEXT)
    with (
        pytest.raises(OpeningCheckError, match=f"The server's {NAME}_text does not reproduce PyTorch's"),
        running_server(own.parent, environment=server_environment),
    ):
        pass


def test_a_probe_without_an_answer_is_said(alone: Server, own: Path) -> None:
    tower = f"{NAME}_text_tower_fp32"
    with pytest.raises(EngineError, match=f"{tower} does not answer its opening probes: .*refused"):
        require_right_answers("http://127.0.0.1:1", own.parent, {tower})
    probes = OpeningProbes.read(opening_path(own.parent, Manifest.read(own).variants["fp32"].text))
    runs = tuple({**run, "attention_mask": run["attention_mask"][:, :1]} for run in probes.runs)
    dataclasses.replace(probes, runs=runs).save(
        opening_path(own.parent, Manifest.read(own).variants["fp32"].text)
    )
    with pytest.raises(EngineError, match=f"{tower} does not answer its opening probes: "):
        require_right_answers(alone.addresses.http_url, own.parent, {tower})


def test_a_towers_engine_is_read_from_its_configuration(own: Path) -> None:
    tower = Manifest.read(own).variants["fp32"].text
    assert engine_of_tower(own.parent, tower) is Engine.ONNXRUNTIME
    config = own.parent / tower.model / "config.pbtxt"
    config.write_text('platform: "tensorrt_plan"\n')
    assert engine_of_tower(own.parent, tower) is Engine.TENSORRT
    config.write_text('name: "x"\n')
    with pytest.raises(ManifestError, match="has no known tower backend"):
        engine_of_tower(own.parent, tower)


def test_front_ends_for_a_model_keep_its_probes(own: Path, server_environment: ServerEnvironment) -> None:
    frontends_from_model(own)
    assert Manifest.read(own).probes
    with (
        running_server(own.parent, environment=server_environment) as server,
        Encoder.open(f"grpc://{server.addresses.grpc}/{NAME}", precision=Precision.FP32) as encoder,
    ):
        assert encoder.embed_texts(["gato"]).shape == (1, encoder.dim)
