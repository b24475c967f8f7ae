"""An opened model proves itself: files by checksum, towers by PyTorch's vectors of their opening probes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from altered_models import (
    computing_otherwise,
    copied,
    graph_of,
    of_before,
    overwritten,
    rerecorded,
    with_flipped_byte,
)
from corpus_runs import options, write_texts
from sample_models import Exported
from typer.testing import CliRunner

import runtime.opening.model_check as check_module
from runtime import Encoder, machine
from runtime.backends import open_backend
from runtime.commands.app import app
from runtime.corpus import EngineChoice, embed_corpus
from runtime.corpus.journal import Shard
from runtime.errors import CorpusError, EngineError, ManifestError, OpeningCheckError
from runtime.local import LocalEncoder
from runtime.losses import reason_against
from runtime.machine import cpu_model, machine_in_words
from runtime.manifest import Engine, Manifest, Modality, Precision, TextPreprocessing, manifest_path
from runtime.opening.cache import PassCache, default_cache_folder
from runtime.opening.model_check import has_opening_file, opening_path, probes_of_tower
from runtime.opening.probes import OpeningProbes, space_of_manifest
from runtime.opening.tower_check import Checks, opening_cosines, require_opening, worst_shortfall
from runtime.probes import Probes, opening_images, opening_texts, probes_path
from runtime.server.checks import verify_served_files

NAME = "nllb-siglip-mrl"


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    """A sample with MRL heads and language tokens."""
    return exported(NAME)


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return copied(model, tmp_path / "own")


@pytest.fixture(scope="module")
def elsewhere(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose towers compute otherwise here than where it was exported; its files are whole."""
    made = copied(model, tmp_path_factory.mktemp("elsewhere") / "r")
    return computing_otherwise(made, *Modality)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Towers whose check ran, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    towers: list[str] = []

    def counted(backend: Any, probes: OpeningProbes, *, tower: str, **others: Any) -> None:
        towers.append(tower)
        require_opening(backend, probes, tower=tower, **others)

    monkeypatch.setattr(check_module, "require_opening", counted)
    return towers


def open_towers(model: Path, **arguments: Any) -> None:
    with LocalEncoder.from_repository(model, **arguments) as encoder:
        for modality in Modality:
            encoder.open_tower(modality)


# What an export leaves


def test_an_export_keeps_probes_figures_and_the_machine(model: Path) -> None:
    manifest = Manifest.read(model)
    variant = manifest.variants["fp32"]
    assert variant.measured_on["cpu"] == cpu_model()
    assert manifest.probes[0].path == f"{NAME}.probes.npz"
    for modality in Modality:
        tower = variant.tower(modality)
        assert has_opening_file(tower)
        probes = OpeningProbes.read(opening_path(model.parent, tower))
        assert probes.measured_on == variant.measured_on
        assert set(probes.vectors) == set(tower.outputs.values())
        assert set(probes.figures) == set(variant.engines)
        said = variant.parity["opening"][modality.value]
        assert len(said["probes"]) == probes.n_rows == (4 if modality is Modality.TEXT else 3)
        for engine, figures in probes.figures.items():
            assert said["engines"][engine] == {name: list(row) for name, row in figures.items()}
            assert min(min(row) for row in figures.values()) > 1 - 1e-9


def test_text_probes_are_of_several_languages_and_lengths_the_long_one_alone(model: Path) -> None:
    tower = Manifest.read(model).variants["fp32"].text
    probes = OpeningProbes.read(opening_path(model.parent, tower))
    assert len(set(probes.languages)) >= 3
    assert [len(run["input_ids"]) for run in probes.runs] == [3, 1]
    lengths = [run["attention_mask"].sum(axis=1).tolist() for run in probes.runs]
    assert lengths[1][0] > 3 * max(lengths[0])
    assert sum(run["input_ids"].size for run in probes.runs) <= 4 * 32
    assert len(set(probes.texts[-1].split())) > 50


def test_probes_of_older_manifests_stay_of_their_space() -> None:
    text = TextPreprocessing(77, 1, (), (2,), "none")
    usual = space_of_manifest("bt2-0", text)
    assert "padding" not in usual["preprocessing"]
    assert usual["preprocessing"]["language_ids"] == {}
    fixed = space_of_manifest("bt2-0", dataclasses.replace(text, padding="context"))
    assert fixed["preprocessing"] == {**usual["preprocessing"], "padding": "context"}


def test_probes_come_back_whole(model: Path, tmp_path: Path) -> None:
    for modality in Modality:
        tower = Manifest.read(model).variants["fp32"].tower(modality)
        probes = OpeningProbes.read(opening_path(model.parent, tower))
        probes.save(tmp_path / "again.npz")
        again = OpeningProbes.read(tmp_path / "again.npz")
        for field in ("texts", "languages", "images", "figures", "measured_on", "modality"):
            assert getattr(again, field) == getattr(probes, field)
        for one, other in zip((*again.runs, again.vectors), (*probes.runs, probes.vectors), strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("content", [None, b"", b"PK", b"no file of numpy"])
def test_damaged_probes_are_an_error(
    content: bytes | None, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # an earlier test may have passed the check
    path = opening_path(own.parent, Manifest.read(own).variants["fp32"].text)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ManifestError, match=r"opening\.npz"):
        Encoder.open(own)
    with pytest.raises(ManifestError, match=r"opening\.npz (is missing|cannot be read)"):
        open_towers(own, verify=Checks.OPENING)


UNIT = np.eye(4, dtype=np.float32)


def test_the_choice_of_texts() -> None:
    vectors = np.stack([UNIT[0], UNIT[0], UNIT[1], UNIT[2], UNIT[3], UNIT[0], UNIT[1]])
    texts = ["a", " ", "b", "c", "d", "e", "too long"]
    languages = ["eng_Latn", "por_Latn", "por_Latn", "eng_Latn", "deu_Latn", "fra_Latn", "fra_Latn"]
    assert opening_texts(texts, languages, [3, 2, 3, 5, 9, 60, 500], vectors) == [2, 3, 4, 5]
    assert opening_texts(texts[:1], languages[:1], [3], vectors[:1]) == [0]
    assert opening_texts([], [], [], vectors[:0]) == []


def test_the_choice_of_images() -> None:
    assert opening_images(np.stack([UNIT[0], UNIT[0], UNIT[1], UNIT[0], UNIT[2]])) == [0, 2, 4]
    assert opening_images(UNIT[:2]) == [0, 1]


# Figures and slack


def probes_at(figure: float) -> OpeningProbes:
    vectors = {"vector": UNIT[:2]}
    return OpeningProbes(
        Modality.TEXT, (), vectors, ("a", "b"), ("eng_Latn", "por_Latn"), (),
        {"onnxruntime": {"vector": (1.0, figure)}}, {"cpu": "A CPU", "instruction_sets": ["avx2"]},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "figure", "found", "holds"),
    [
        (Precision.FP32, 1 - 1e-12, 1 - 1e-7, True),
        (Precision.FP32, 1 - 1e-12, 1 - 3e-5, False),
        (Precision.FP16, 0.99999, 0.9999, True),
        (Precision.FP16, 0.99999, 0.998, False),
        (Precision.BF16, 0.9995, 0.9985, True),
        (Precision.BF16, 0.9995, 0.99, False),
        (Precision.INT8, 0.9968, 0.9966, True),
        (Precision.INT8, 0.9968, 0.9765, False),
        (Precision.INT8, 0.9997, 0.9955, False),
        (Precision.INT8, 0.9997, 0.17, False),
        (Precision.FP8, 0.997, 0.9, False),
        (Precision.INT8, 0.9997, math.nan, False),
    ],
)
def test_what_a_cosine_may_lack(precision: Precision, figure: float, found: float, holds: bool) -> None:
    probes = probes_at(figure)
    worst = worst_shortfall({"vector": (1.0, found)}, probes, engine="onnxruntime", precision=precision)
    assert (worst is None) is holds
    if worst is not None:
        assert (worst.probe, worst.measured, worst.n_short, worst.n_rows) == (
            "probe text 'b' (por_Latn)", figure, 1, 2,
        )  # fmt: skip


def test_an_engine_without_figures_is_said() -> None:
    with pytest.raises(ManifestError, match="none of openvino"):
        worst_shortfall({"vector": (1.0, 1.0)}, probes_at(1.0), engine="openvino", precision=Precision.FP32)


class Answering:
    """A backend that answers with given vectors."""

    def __init__(self, vectors: Any) -> None:
        self.vectors = vectors

    def run(self, inputs: Mapping[str, Any], outputs: list[str]) -> list[Any]:
        return [self.vectors[: len(inputs["input_ids"])] for _ in outputs]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_vectors_that_are_none_do_not_pass(broken: float) -> None:
    vectors = UNIT[:2].copy()
    vectors[1] = broken
    probes = dataclasses.replace(probes_at(1.0), runs=({"input_ids": np.zeros((2, 3), np.int64)},))
    with pytest.raises(
        OpeningCheckError, match=r"probe text 'b' \(por_Latn\) is not finite or zero"
    ) as error:
        require_opening(
            Answering(vectors), probes, tower="t", engine=Engine.ONNXRUNTIME, precision=Precision.INT8
        )
    assert error.value.tower == "t"
    assert math.isnan(error.value.cosine)
    with pytest.raises(EngineError, match="does not match its probes"):
        require_opening(
            Answering(vectors[:, :3]), probes, tower="t", engine=Engine.ONNXRUNTIME, precision=Precision.INT8
        )


# Opening


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("modality", Modality)
def test_a_graph_that_computes_otherwise_here_is_refused(
    modality: Modality, engine: str, elsewhere: Path
) -> None:
    pytest.importorskip(engine)
    with (
        LocalEncoder.from_repository(elsewhere, engine=engine, threads=1) as encoder,
        pytest.raises(OpeningCheckError) as error,
    ):
        encoder.open_tower(modality)
    message = str(error.value)
    other = "openvino" if engine == "onnxruntime" else "onnxruntime"
    for part in (
        f"{NAME}_{modality.value}_tower_fp32",
        "probe",
        f"{error.value.cosine:.6f}",
        machine_in_words(),
        "measured on",
        f"engine='{other}'",
        "Export the checkpoint again",
    ):
        assert part in message
    assert error.value.cosine < error.value.required


def test_a_tower_is_checked_when_it_is_opened_and_not_before(own: Path, asked: list[str]) -> None:
    computing_otherwise(own, Modality.IMAGE)
    with Encoder.open(own, threads=1) as encoder:
        assert asked == []
        encoder.embed_texts(["gato"], "por_Latn")
        assert asked == [f"{NAME}_text_tower_fp32"]
        for _ in range(2):  # a failure is not remembered, and the tower stays shut
            with pytest.raises(OpeningCheckError):
                encoder.embed_images([np.zeros((9, 9, 3), np.uint8)])
    assert asked[1:] == [f"{NAME}_image_tower_fp32"] * 2


def test_narrow_heads_are_checked_too(own: Path) -> None:
    path = opening_path(own.parent, Manifest.read(own).variants["fp32"].text)
    probes = OpeningProbes.read(path)
    name = next(name for name in probes.vectors if name != "vector")
    wrong = {**probes.vectors, name: -probes.vectors[name]}
    dataclasses.replace(probes, vectors=wrong).save(path)
    with Encoder.open(rerecorded(own)) as encoder, pytest.raises(OpeningCheckError, match=f"the head {name}"):
        encoder.embed_texts(["gato"], "por_Latn")


@pytest.mark.parametrize("place", ["start", "weight", "end"])
@pytest.mark.parametrize("modality", Modality)
def test_one_flipped_bit_is_refused(place: str, modality: Modality, own: Path) -> None:
    path = graph_of(own, modality)
    with_flipped_byte(path, place)
    if place == "weight":
        open_backend(Engine.ONNXRUNTIME, path, precision=Precision.FP32, threads=1).close()
    with pytest.raises(ManifestError, match=r"model\.onnx has sha256 .* copy the repository again"):
        Encoder.open(own)


@pytest.mark.parametrize("file", ["tokenizer", "opening", "config.pbtxt"])
def test_every_file_that_is_read_is_compared(file: str, own: Path) -> None:
    variant = Manifest.read(own).variants["fp32"]
    path = {
        "tokenizer": own.parent / variant.tokenizer,
        "opening": opening_path(own.parent, variant.image),
        "config.pbtxt": own.parent / variant.text.model / "config.pbtxt",
    }[file]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ManifestError, match=f"{path.name} has sha256"):
        Encoder.open(own)


def test_a_file_without_a_checksum_is_not_trusted(own: Path) -> None:
    data = json.loads(manifest_path(own).read_text())
    tower = data["variants"]["fp32"]["text"]
    tower["files"] = [f for f in tower["files"] if not f["path"].endswith("tokenizer.json")]
    manifest_path(own).write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=r"no checksum of .*tokenizer\.json"):
        Encoder.open(own)


def test_weights_that_were_overwritten_fail_without_checksums_too(own: Path) -> None:
    overwritten(graph_of(own, Modality.IMAGE))
    with pytest.raises(OpeningCheckError):
        open_towers(own, verify=Checks.OPENING, threads=1)


def test_to_skip_the_checks_is_said_once(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "babeltower"):
        for _ in range(2):
            with Encoder.open(elsewhere, verify=False, threads=1) as encoder:
                encoder.embed_texts(["gato"], "por_Latn")
        open_towers(elsewhere, verify=Checks.NONE)
    (said,) = [r.getMessage() for r in caplog.records if "verify=False" in r.getMessage()]
    assert said.startswith(f"{elsewhere} is opened with verify=False")


# Models of before


def test_a_model_of_before_is_held_to_what_was_measured(own: Path, asked: list[str]) -> None:
    of_before(own)
    open_towers(own, threads=1)
    open_towers(own, threads=1)
    assert asked == [f"{NAME}_{modality.value}_tower_fp32" for modality in Modality]
    for modality in Modality:
        probes = probes_of_tower(
            own.parent, Manifest.read(own), Manifest.read(own).variants["fp32"], modality
        )
        assert probes is not None
        assert probes.n_rows == (4 if modality is Modality.TEXT else 3)
    computing_otherwise(own, Modality.TEXT)
    with pytest.raises(OpeningCheckError, match="recorded no figures per probe"):
        open_towers(own, threads=1)


def test_a_model_of_before_without_figures_is_held_to_its_limits(own: Path) -> None:
    of_before(own)
    data = json.loads(manifest_path(own).read_text())
    data["variants"]["fp32"]["parity"] = {"limits": {"min_cosine": 0.8}}
    manifest_path(own).write_text(json.dumps(data))
    manifest = Manifest.read(own)
    probes = probes_of_tower(own.parent, manifest, manifest.variants["fp32"], Modality.IMAGE)
    assert probes is not None
    assert probes.figures["onnxruntime"] == {"vector": (0.8, 0.8, 0.8)}


def test_a_model_without_any_probes_is_said(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_before(own)
    probes_path(own).unlink()
    with caplog.at_level(logging.WARNING, "babeltower"):
        open_towers(own, threads=1)
    assert "has no probes with PyTorch's vectors" in caplog.text


def test_probes_that_are_not_the_manifests_are_refused(own: Path) -> None:
    record = Manifest.read(own).probes[0]
    Probes.read(own, record)
    data = bytearray(probes_path(own).read_bytes())
    data[-9] ^= 1
    probes_path(own).write_bytes(bytes(data))
    with pytest.raises(ManifestError, match=r"probes\.npz has sha256"):
        Probes.read(own, record)


# The cache


def test_a_pass_is_remembered_and_costs_no_run(model: Path, asked: list[str], tmp_path: Path) -> None:
    for _ in range(3):
        open_towers(model, threads=1)
    assert asked == [f"{NAME}_{modality.value}_tower_fp32" for modality in Modality]
    assert len(list((tmp_path / "cache" / "babeltower" / "opening").iterdir())) == 2
    open_towers(model, threads=1, cache=tmp_path / "another")
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (machine, "cpu_model", lambda: "Another CPU"),
        (machine, "instruction_sets", lambda: ("avx2", "avx512_vnni")),
        (check_module, "engine_version", lambda engine: "9.9"),
    ],
)
def test_another_machine_or_engine_is_checked_anew(
    where: Any, name: str, value: Any, model: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_towers(model, threads=1)
    monkeypatch.setattr(where, name, value)
    open_towers(model, threads=1)
    assert len(asked) == 4


def test_variables_that_change_kernels_are_checked_anew(
    model: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_towers(model, threads=1)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    open_towers(model, threads=1)
    open_towers(model, threads=2)
    assert len(asked) == 6


def test_another_graph_is_checked_anew(own: Path, asked: list[str]) -> None:
    open_towers(own, threads=1)
    with_flipped_byte(graph_of(own, Modality.TEXT), "weight")
    open_towers(rerecorded(own), threads=1)
    assert asked[2:] == [f"{NAME}_text_tower_fp32"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b'{"cpu": "another"}'])
def test_a_damaged_cache_is_ignored_and_mended(
    content: bytes, model: Path, asked: list[str], tmp_path: Path
) -> None:
    open_towers(model, threads=1)
    folder = tmp_path / "cache" / "babeltower" / "opening"
    for path in folder.iterdir():
        path.write_bytes(content)
    open_towers(model, threads=1)
    open_towers(model, threads=1)
    assert len(asked) == 4


@pytest.mark.parametrize("blocked", ["a file", "a file above", "a folder in place of the pass"])
def test_a_cache_that_cannot_be_written_means_a_check_each_time(
    blocked: str, model: Path, asked: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "blocked"
    if blocked == "a folder in place of the pass":
        open_towers(model, threads=1, cache=folder)
        for path in list(folder.iterdir()):
            path.unlink()
            (path / "x").mkdir(parents=True)
        asked.clear()
    else:
        folder.write_text("")
        folder = folder if blocked == "a file" else folder / "below"
    for _ in range(2):
        open_towers(model, threads=1, cache=folder)
    assert len(asked) == 4


def test_no_home_means_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_cache_folder() is None
    nowhere = PassCache(None)
    nowhere.add({"a": 1})
    assert not nowhere.has({"a": 1})


def test_many_writers_leave_whole_files(tmp_path: Path) -> None:
    cache = PassCache(tmp_path / "c")
    facts = [{"n": i % 5, "padding": "x" * 20_000} for i in range(100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cache.add, facts))
        assert all(pool.map(cache.has, facts))
    assert len(list((tmp_path / "c").iterdir())) == 5


OPEN = """
import sys
from runtime import Encoder, Modality
with Encoder.open(sys.argv[1], threads=1, cache=sys.argv[2]) as encoder:
    encoder.open_tower(Modality.TEXT)
"""


def test_two_processes_at_once(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPEN, str(model), str(tmp_path / "c")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    (path,) = (tmp_path / "c").iterdir()
    assert json.loads(path.read_text())["engine"] == "onnxruntime"


# Commands, shards, choices


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts.parquet", [f"um gato {i}" for i in range(200)])


@pytest.mark.parametrize("shard", ["0/1", "1/2"])
def test_a_corpus_is_not_embedded_with_a_tower_that_is_wrong_here(
    shard: str, elsewhere: Path, source: Path, tmp_path: Path
) -> None:
    by_hand = ["--engine", "onnxruntime", "--precision", "fp32", "--instances", "1", "--threads", "1"]
    arguments = ["embed", str(elsewhere), str(source), "--out", str(tmp_path / "out"), "--language", "pt"]
    done = CliRunner().invoke(app, [*arguments, *by_hand, "--shard", shard, "--rows-per-part", "64"])
    assert done.exit_code == 1
    assert "does not reproduce PyTorch's vectors on this machine" in done.output
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_shard_whose_copy_is_damaged_is_refused(own: Path, source: Path, tmp_path: Path) -> None:
    with_flipped_byte(graph_of(own, Modality.TEXT), "weight")
    with pytest.raises(ManifestError, match="sha256"):
        embed_corpus(own, source, tmp_path / "out", options(shard=Shard(1, 2)))


def test_search_asks_no_tower_that_is_wrong_here(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(Probes.read(elsewhere).images[0])
    arguments = ["search", str(elsewhere), "gato", str(tmp_path / "images"), "--language", "pt"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "does not reproduce PyTorch's vectors on this machine" in done.output


def with_int8(model: Path, **limits: Any) -> Path:
    """The same towers under another name: an INT8 variant with figures of its own."""
    manifest = Manifest.read(model)
    fp32 = manifest.variants["fp32"]
    means = {"text_to_image": {"reference": 0.5, "exported": 0.498}}
    parity = {
        **fp32.parity,
        "limits": {"retrieval": {"max_mean_drop": 0.005}, "accepted_drop": None, **limits},
        "retrieval": {"onnxruntime 1": {"mean_recall_at_1": means}},
    }
    int8 = dataclasses.replace(fp32, precision=Precision.INT8, engines=("onnxruntime",), parity=parity)
    variants = {"fp32": fp32, "int8_onnxruntime": int8}
    manifest_path(model).write_text(dataclasses.replace(manifest, variants=variants).to_json())
    return model


def rate_of_precision(monkeypatch: pytest.MonkeyPatch, *, broken: bool = False) -> None:
    """INT8 is measured at ten times the rate, or fails its check."""
    import runtime.corpus.engines as engines

    def rate(model: Any, choice: EngineChoice, modality: Modality, *, cache: Path | None = None) -> float:
        if choice.precision is Precision.INT8 and broken:
            raise OpeningCheckError("the INT8 tower does not give PyTorch's vectors.")
        return 1_000.0 if choice.precision is Precision.INT8 else 100.0

    monkeypatch.setattr(engines, "rows_per_second", rate)


@pytest.mark.parametrize(
    ("limits", "broken", "chosen", "said"),
    [
        ({}, False, Precision.INT8, "chose onnxruntime int8 1×1: 1,000.0 rows/s"),
        ({"accepted_drop": 0.02}, False, Precision.FP32, "exported with an accepted drop of 2 points"),
        ({"retrieval": {"max_mean_drop": 0.001}}, False, Precision.FP32, "over the limit of 0.1"),
        ({}, True, Precision.FP32, "onnxruntime int8 1×1 was dropped: the INT8 tower does not give"),
    ],
)
def test_a_precision_that_nobody_asked_for_is_right_first(
    limits: dict[str, Any], broken: bool, chosen: Precision, said: str, own: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from runtime.corpus.engines import choice_from_arguments

    rate_of_precision(monkeypatch, broken=broken)
    asked_for = EngineChoice(Engine.ONNXRUNTIME, None, 1, 1)
    choice = choice_from_arguments(asked_for, None, model=with_int8(own, **limits), modality=Modality.TEXT)
    assert choice.precision is chosen
    assert any(said in reason for reason in choice.reasons)
    if chosen is Precision.INT8:
        assert "loses 0.20 points of R@1" in choice.reasons[0]


def test_a_precision_that_was_asked_for_is_taken_with_its_accepted_drop(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.corpus.engines import choice_from_arguments

    rate_of_precision(monkeypatch)
    asked_for = EngineChoice(None, Precision.INT8, 1, None)
    found = choice_from_arguments(
        asked_for, None, model=with_int8(own, accepted_drop=0.02), modality=Modality.TEXT
    )
    assert found.precision is Precision.INT8


def test_a_choice_is_an_error_where_every_candidate_is_wrong(
    elsewhere: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        CorpusError, match=r"No engine on this machine runs .*was dropped: .*does not reproduce PyTorch's"
    ):
        embed_corpus(elsewhere, source, tmp_path / "out", options(engine=EngineChoice()))


def test_the_command_says_what_it_chose_and_why(model: Path, source: Path, tmp_path: Path) -> None:
    arguments = ["embed", str(model), str(source), "--out", str(tmp_path / "out"), "--language", "pt"]
    done = CliRunner().invoke(app, [*arguments, "--cache", str(tmp_path / "c")])
    assert done.exit_code == 0, done.output
    assert "retrieval loss not measured" in done.output
    assert "chose " in done.output
    assert list((tmp_path / "c").iterdir())


def test_a_warning_of_the_library_is_printed_by_commands(own: Path, source: Path, tmp_path: Path) -> None:
    of_before(own)
    probes_path(own).unlink()
    by_hand = ["--engine", "onnxruntime", "--precision", "fp32", "--instances", "1", "--threads", "1"]
    arguments = ["embed", str(own), str(source), "--out", str(tmp_path / "out"), "--language", "pt"]
    done = CliRunner().invoke(app, [*arguments, *by_hand])
    assert done.exit_code == 0, done.output
    assert "warning: " in done.output
    assert "has no probes" in done.output


# Saturation


def test_saturated_sums_fall_short_where_exact_ones_hold() -> None:
    """Full-range weights on CPUs without VNNI: sums of two products, clipped at 16 bits."""
    random = np.random.default_rng(0)
    x, w = (
        random.integers(0, 256, (4, 256)),
        np.clip(np.round(random.standard_normal((256, 32)) * 80), -127, 127),
    )
    pairs = x[:, 0::2, None] * w[None, 0::2] + x[:, 1::2, None] * w[None, 1::2]
    exact, saturated = pairs.sum(1), np.clip(pairs, -32768, 32767).sum(1)

    def cosine(a: Any, b: Any) -> tuple[float, ...]:
        return tuple((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))

    reference = exact + random.standard_normal(exact.shape) * exact.std() * 0.03
    figures = cosine(exact, reference)
    probes = OpeningProbes(
        Modality.IMAGE,
        (),
        {"vector": reference},
        images=(b"",) * 4,
        figures={"onnxruntime": {"vector": figures}},
    )
    hold = {"engine": "onnxruntime", "precision": Precision.INT8}
    assert worst_shortfall({"vector": figures}, probes, **hold) is None
    assert worst_shortfall({"vector": cosine(saturated, reference)}, probes, **hold) is not None


def test_the_check_is_of_the_backend_that_was_opened(model: Path) -> None:
    """The cosines at export are those of the same run here: nothing else is compared."""
    for modality in Modality:
        tower = Manifest.read(model).variants["fp32"].tower(modality)
        backend = open_backend(Engine.ONNXRUNTIME, graph_of(model, modality), precision=Precision.FP32)
        probes = OpeningProbes.read(opening_path(model.parent, tower))
        found = opening_cosines(backend, probes)
        backend.close()
        for name, cosines in found.items():
            np.testing.assert_allclose(cosines, probes.figures["onnxruntime"][name], atol=1e-9)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text", "suffix_ids", []),
        ("text", "context_length", 8),
        ("text", "pad_id", 0),
        ("text", "clean", "none"),
        ("image", "interpolation", "bilinear"),
        ("image", "height", 32),
        ("image", "crop_rounding", "floor"),
        ("image", "mean", [0.4, 0.4, 0.4]),
        ("text", "language_ids", {"por_Latn": 7, "eng_Latn": 5}),
        (None, "fingerprint", "bt2-" + "0" * 32),
    ],
)
def test_an_edited_manifest_is_refused_whatever_was_remembered(
    part: str | None, field: str, value: object, own: Path
) -> None:
    """The manifest says how inputs are made: it must say what the towers were exported with."""
    with Encoder.open(own) as encoder:  # remembered as passed
        for modality in Modality:
            encoder.open_tower(modality)
    path = manifest_path(own)
    data = json.loads(path.read_text(encoding="utf-8"))
    target = data if part is None else data[part]
    assert target[field] != value
    target[field] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    modality = Modality.IMAGE if part == "image" else Modality.TEXT
    with (
        Encoder.open(own) as encoder,
        pytest.raises(ManifestError, match=f"differs in {field}.*changed after the export"),
    ):
        encoder.open_tower(modality)
    with pytest.raises(ManifestError, match=f"differs in {field}"):
        verify_served_files(own.parent, None)


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf, None, "0.2"])
def test_a_loss_that_is_no_number_was_not_measured(model: Path, figure: object) -> None:
    variant = Manifest.read(model).variants["fp32"]
    means = {key: {"reference": 0.2, "exported": 0.2} for key in ("text_to_image", "image_to_text")}
    parity = {
        "limits": {"retrieval": {"max_mean_drop": 0.005}},
        "retrieval": {"onnxruntime 1": {"mean_recall_at_1": means}},
    }
    int8 = dataclasses.replace(variant, precision=Precision.INT8, parity=parity)
    assert reason_against(int8, "onnxruntime") is None
    means["image_to_text"] = {"reference": 0.2, "exported": figure}
    if figure == "0.2":
        assert reason_against(int8, "onnxruntime") is None
    else:
        assert reason_against(int8, "onnxruntime") == "its retrieval loss was not measured"


def test_a_cache_of_nested_lists_counts_as_none(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with LocalEncoder.from_repository(own, cache=folder) as encoder:
        encoder.open_tower(Modality.TEXT)
    for path in folder.rglob("*.json"):
        path.write_bytes(b"[" * 100_000)
    with LocalEncoder.from_repository(own, cache=folder) as encoder:
        encoder.open_tower(Modality.TEXT)
