"""The client on a real server: the in-process vectors, loss in mid-load, and a rollout under traffic."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from altered_models import computing_otherwise, copied, graph_of, overwritten, rerecorded
from corpus_runs import output_of
from sample_models import Exported
from stock_backends import require_accepted
from traffic import Traffic

from export.parity.probes import probe_images
from export.triton.frontends import frontends_from_model
from export.triton.tower_config import TowerSettings, tower_config
from runtime import Encoder
from runtime.corpus import EngineChoice, Options, embed_corpus
from runtime.errors import (
    EngineError,
    ImageError,
    LanguageError,
    ManifestError,
    RolloutError,
    UnansweredError,
)
from runtime.manifest import Engine, Manifest, Modality, Precision
from runtime.probes import Probes, probes_path
from runtime.remote import Connection
from runtime.rollout import roll_out
from runtime.server import Server, ServerEnvironment, ServerOptions, running_server
from runtime.server.backends import write_backends

NAME = "nllb-clip"
LOCAL = EngineChoice(Engine.ONNXRUNTIME, Precision.FP32, instances=1, threads=1)


@pytest.fixture(params=["grpc", "http"])
def address(request: pytest.FixtureRequest, served: Server) -> str:
    host = served.addresses.grpc if request.param == "grpc" else served.addresses.http
    return f"{request.param}://{host}/{NAME}"


def test_vectors_equal_the_in_process_ones(address: str, exported: Exported) -> None:
    model = exported(NAME)
    probes = Probes.read(model)
    texts, languages = probes.texts[::7], probes.languages[::7]
    images = [*probe_images(), probes.images[0], np.asarray(probe_images()[0])]
    with Encoder.open(model, threads=1) as local, Encoder.open(address) as remote:
        assert (remote.dims, remote.fingerprint) == (local.dims, local.fingerprint)
        assert (
            np.abs(remote.embed_texts(texts, languages) - local.embed_texts(texts, languages)).max() <= 1e-6
        )
        assert np.abs(remote.embed_images(images) - local.embed_images(images)).max() <= 1e-6


def test_shared_memory_gives_the_same_vectors(address: str, exported: Exported) -> None:
    images = Probes.read(exported(NAME)).images
    with (
        Encoder.open(address) as plain,
        Encoder.open(address, connection=Connection(shared_memory=True)) as shared,
    ):
        assert np.array_equal(plain.embed_images(images), shared.embed_images(images))


def test_a_corpus_is_embedded_as_in_process(address: str, exported: Exported, tmp_path: Path) -> None:
    texts = [f"gato {i % 40}" for i in range(60)] + [""]
    rows = [
        json.dumps({"text": text, "language": "pt" if i % 2 else "zho_Hans"}) for i, text in enumerate(texts)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join([*rows, '{"text": "a", "language": "xx"}']))
    (tmp_path / "images").mkdir()
    for i, data in enumerate([png(), b"no image"]):
        (tmp_path / "images" / f"{i}.png").write_bytes(data)
    for name, kinds in (
        ("texts.jsonl", {"empty-text": 1, "unknown-language": 1}),
        ("images", {"corrupt-image": 1}),
    ):
        vectors = {}
        for model, choice in ((exported(NAME), LOCAL), (address, EngineChoice())):
            out = tmp_path / f"{name}-{len(vectors)}"
            record = embed_corpus(model, tmp_path / name, out, Options(engine=choice))
            assert record.bad_kinds == kinds
            vectors[model] = output_of(out)
        (ids, local), (remote_ids, remote) = vectors.values()
        assert remote_ids == ids
        assert np.abs(remote - local).max() <= 1e-6


def test_a_bad_input_is_named_by_its_place(address: str) -> None:
    with Encoder.open(address) as encoder:
        with pytest.raises(LanguageError, match=r"^Text 20: "):
            encoder.embed_texts(["gato"] * 21, ["por_Latn"] * 20 + ["xx"])
        with pytest.raises(ImageError, match=r"^Image 1: "):
            encoder.embed_images([png(), b"no image", png()])


def png() -> bytes:
    file = io.BytesIO()
    probe_images()[0].save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def alone(exported: Exported, tmp_path: Path) -> Path:
    """One sample in a repository of its own, which a test may change."""
    return copied(exported(NAME), tmp_path / "served")


def test_towers_for_openvino_are_served_as_their_stock_backend_wants_them(
    alone: Path, server_environment: ServerEnvironment
) -> None:
    manifest = Manifest.read(alone)
    variant = manifest.variant(Precision.FP32)
    for tower in (variant.text, variant.image):
        folder = alone.parent / tower.model
        config = tower_config(
            folder,
            folder / "1" / tower.graph,
            engine=Engine.OPENVINO,
            precision=Precision.FP32,
            fingerprint=manifest.fingerprint,
            max_batch_size=tower.max_batch_size,
            context_length=manifest.text.context_length,
        )
        (folder / "config.pbtxt").write_text(config.to_pbtxt())
        assert require_accepted(folder).max_batch_size == 0
    frontends_from_model(alone, towers=TowerSettings(instances=1, threads=1))
    probes = Probes.read(alone)
    texts, languages, images = probes.texts[::11], probes.languages[::11], probes.images
    with (
        running_server(alone.parent, environment=server_environment) as server,
        Encoder.open(f"grpc://{server.addresses.grpc}/{NAME}", engine="openvino") as remote,
        Encoder.open(alone, engine="openvino", threads=1) as local,
    ):
        found = remote.embed_texts(texts, languages)
        assert np.abs(found - local.embed_texts(texts, languages)).max() <= 1e-6
        assert np.abs(remote.embed_images(images) - local.embed_images(images)).max() <= 1e-6


@pytest.mark.skipif("BABELTOWER_STOCK_BACKENDS" not in os.environ, reason="needs Triton's own backends")
def test_tritons_own_backends_serve_the_same_repository(
    exported: Exported, server_environment: ServerEnvironment
) -> None:
    """``BABELTOWER_STOCK_BACKENDS`` is their folder; ``docs/stock-backends.md`` says how it is built."""
    model = exported(NAME)
    probes = Probes.read(model)
    texts, languages, images = probes.texts[::11], probes.languages[::11], probes.images
    options = ServerOptions(backends=Path(os.environ["BABELTOWER_STOCK_BACKENDS"]))
    with running_server(model.parent, environment=server_environment, options=options) as server:
        assert "TRITONBACKEND_Initialize: onnxruntime" in server.log.read_text()
        address = f"grpc://{server.addresses.grpc}/{NAME}"
        with Encoder.open(address) as remote, Encoder.open(model, threads=1) as local:
            found = remote.embed_texts(texts, languages)
            assert np.abs(found - local.embed_texts(texts, languages)).max() <= 1e-6
            assert np.abs(remote.embed_images(images) - local.embed_images(images)).max() <= 1e-6


def test_a_folder_without_backends_is_said(server_environment: ServerEnvironment, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"has no backend; expected .*libtriton_onnxruntime\.so"):
        write_backends(server_environment, tmp_path / "backends", stock=tmp_path)


def test_a_killed_server_in_mid_load(alone: Path, server_environment: ServerEnvironment) -> None:
    probes = Probes.read(alone)
    texts, languages = list(probes.texts[:300]), list(probes.languages[:300])
    with running_server(alone.parent, environment=server_environment) as server:
        port = int(server.addresses.grpc.rpartition(":")[2])
        hasty = Connection(retry_for_s=0.5, concurrency=2, texts_per_request=4)
        encoder = Encoder.open(f"grpc://{server.addresses.grpc}/{NAME}", connection=hasty)
        patient = Encoder.open(
            f"grpc://{server.addresses.grpc}/{NAME}", connection=Connection(retry_for_s=120)
        )
        threading.Timer(0.3, server.kill).start()
        error = loss_of(encoder, texts, languages)
    assert sorted((*error.answered, *error.unanswered)) == list(range(300))
    assert error.unanswered
    options = ServerOptions(grpc_port=port)
    rest: list[Any] = []
    waiting = threading.Thread(
        target=lambda: rest.append(
            patient.embed_texts(
                [texts[i] for i in error.unanswered], [languages[i] for i in error.unanswered]
            )
        )
    )
    waiting.start()
    with running_server(alone.parent, environment=server_environment, options=options):
        waiting.join()
    everything = np.empty((300, patient.dim), np.float32)
    everything[list(error.answered)] = error.vectors
    everything[list(error.unanswered)] = rest[0]
    assert np.abs(everything - probes.text_vectors[:300]).max() <= 1e-5
    encoder.close()
    patient.close()


def loss_of(encoder: Encoder, texts: list[str], languages: list[str]) -> UnansweredError:
    """Load without an end, until the server is lost."""
    while True:
        try:
            encoder.embed_texts(texts, languages)
        except UnansweredError as error:
            return error


def hasty_traffic(address: str, model: Path) -> Traffic:
    """Two threads that send text by text and repeat nothing: whatever fails is seen."""
    hasty = Connection(retry_for_s=0, texts_per_request=1)
    return Traffic(address, Probes.read(model), hasty, n_threads=2)


@pytest.fixture
def controlled(alone: Path, server_environment: ServerEnvironment) -> Iterator[tuple[Path, str]]:
    """A model, and the address of a server that lets its models be loaded."""
    models = tuple(path.name for path in alone.parent.iterdir() if path.is_dir())
    options = ServerOptions(models=models, explicit=True)
    with running_server(alone.parent, environment=server_environment, options=options) as server:
        yield alone, f"grpc://{server.addresses.grpc}"


def test_a_good_version_loses_no_request(controlled: tuple[Path, str], tmp_path: Path) -> None:
    model, url = controlled
    new = copied(model, tmp_path / "new")
    with hasty_traffic(f"{url}/{NAME}", model) as traffic:
        done = roll_out(model, new, url=url)
    assert (done.version, traffic.errors) == (2, [])
    assert traffic.n_texts > 50
    with Encoder.open(model, threads=1) as local, Encoder.open(f"{url}/{NAME}") as remote:
        vectors = remote.embed_texts(["gato"], "por_Latn")
        assert np.abs(vectors - local.embed_texts(["gato"], "por_Latn")).max() <= 1e-6
    manifest = Manifest.read(model)
    manifest.verify_front_ends(model.parent)
    assert manifest.variant(Precision.FP32).text.version == 2
    assert not list(model.parent.glob("*candidate*"))
    assert [kept.version for kept in manifest.kept] == [1]


def test_a_kept_version_is_switched_back_to(controlled: tuple[Path, str], tmp_path: Path) -> None:
    model, url = controlled
    roll_out(model, copied(model, tmp_path / "new"), url=url)
    with hasty_traffic(f"{url}/{NAME}", model) as traffic:
        done = roll_out(model, 1, url=url)
    assert (done.version, traffic.errors) == (1, [])
    assert traffic.n_texts > 50
    manifest = Manifest.read(model)
    manifest.verify_front_ends(model.parent)
    variant = manifest.variant(Precision.FP32)
    manifest.verify(model.parent, variant)
    assert (variant.text.version, [kept.version for kept in manifest.kept]) == (1, [2])
    broken = model.parent / f"{NAME}_text" / "2" / "frontend.json"
    spec = json.loads(broken.read_text())
    spec["preprocessing"]["suffix_ids"] = []
    broken.write_text(json.dumps(spec))
    with pytest.raises(RolloutError, match=r"Version 2 of .*, kept in the repository, was rolled back"):
        roll_out(model, 2, url=url)
    assert Manifest.read(model) == manifest
    with Encoder.open(f"{url}/{NAME}") as encoder:
        assert encoder.embed_texts(["gato"], "por_Latn").shape == (1, encoder.dim)
    with pytest.raises(ManifestError, match="already serves version 1"):
        roll_out(model, 1, url=url)


def test_a_version_with_wrong_language_tokens_is_taken_back(
    controlled: tuple[Path, str], tmp_path: Path
) -> None:
    model, url = controlled
    new = copied(model, tmp_path / "new")
    spec_path = new.parent / f"{NAME}_text" / "1" / "frontend.json"
    spec = json.loads(spec_path.read_text())
    ids = spec["preprocessing"]["language_ids"]
    ids["por_Latn"], ids["swh_Latn"] = ids["swh_Latn"], ids["por_Latn"]
    spec_path.write_text(json.dumps(spec))
    rerecorded(new)
    before = sorted((p.relative_to(model.parent), p.read_bytes()) for p in model.parent.rglob("*.pbtxt"))
    with (
        hasty_traffic(f"{url}/{NAME}", model) as traffic,
        pytest.raises(RolloutError, match=r"2 of \d+ languages.*(por_Latn|swh_Latn)"),
    ):
        roll_out(model, new, url=url)
    assert traffic.errors == []
    after = sorted((p.relative_to(model.parent), p.read_bytes()) for p in model.parent.rglob("*.pbtxt"))
    assert after == before
    Manifest.read(model).verify_front_ends(model.parent)
    with Encoder.open(model) as local:  # compares every file of the towers
        local.embed_texts(["gato"], "por_Latn")


def test_an_int8_calibrated_on_noise_is_taken_back(controlled: tuple[Path, str], tmp_path: Path) -> None:
    from export.precision.int8 import Int8Recipe, int8_from_onnx

    model, url = controlled
    new = copied(model, tmp_path / "new")
    manifest = Manifest.read(new)
    noise = np.random.default_rng(0)
    for modality in Modality:
        tower = manifest.variant(Precision.FP32).tower(modality)
        graph = new.parent / tower.model / "1" / tower.graph
        size = manifest.image
        batch = (
            {"pixels": noise.integers(120, 136, (4, 3, size.height, size.width), dtype=np.uint8)}
            if modality is Modality.IMAGE
            else {"input_ids": noise.integers(5, 9, (4, 3)), "attention_mask": np.ones((4, 3), np.int64)}
        )
        int8_from_onnx(
            graph,
            tmp_path / f"{modality.value}.onnx",
            data_name=f"{modality.value}.data",
            calibration=[batch],
            recipe=Int8Recipe(),
        )
        for file in graph.parent.iterdir():
            file.unlink()
        shutil.copyfile(tmp_path / f"{modality.value}.onnx", graph)
    rerecorded(new)
    with (
        hasty_traffic(f"{url}/{NAME}", model) as traffic,
        pytest.raises(RolloutError, match="languages are below a mean cosine"),
    ):
        roll_out(model, new, url=url)
    assert traffic.errors == []


def test_a_version_whose_towers_compute_otherwise_here_does_not_load(
    controlled: tuple[Path, str], tmp_path: Path
) -> None:
    model, url = controlled
    new = computing_otherwise(copied(model, tmp_path / "new"), Modality.IMAGE)
    with (
        hasty_traffic(f"{url}/{NAME}", model) as traffic,
        pytest.raises(
            RolloutError, match=r"rolled back.*_image_tower_fp32 does not reproduce PyTorch's vectors"
        ),
    ):
        roll_out(model, new, url=url)
    assert traffic.errors == []


@pytest.mark.parametrize("damage", ["weights", "front end", "kept probes"])
def test_a_version_whose_files_were_changed_is_not_touched(
    damage: str, controlled: tuple[Path, str], tmp_path: Path
) -> None:
    model, url = controlled
    new = copied(model, tmp_path / "new")
    if damage == "weights":
        overwritten(graph_of(new, Modality.TEXT))
    path = (
        new.parent / f"{NAME}_text" / "1" / "frontend.json" if damage == "front end" else probes_path(model)
    )
    if damage != "weights":
        path.write_bytes(path.read_bytes() + b"\n")
    before = sorted(p.relative_to(model.parent) for p in model.parent.rglob("*"))
    with pytest.raises(ManifestError, match=r"(has sha256|bytes; the manifest says)"):
        roll_out(model, new, url=url)
    assert sorted(p.relative_to(model.parent) for p in model.parent.rglob("*")) == before
