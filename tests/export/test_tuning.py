"""Tuning: the search with a stand-in for the server, what is written and confirmed; then a real server."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from sample_models import Exported
from tritonclient.grpc import model_config_pb2

from export.tuning import TuneOptions, Tuning, tune, tuning_of_model
from export.tuning.confirmation import Confirmation, median_interval, paired_loads
from export.tuning.inputs import languages_for, requests_for
from export.tuning.load_generator import Load, load_of_server, text_requests
from export.tuning.operation import (
    ServingSettings,
    operation_of_model,
    publish_operation,
    tuned_files,
    write_operation,
)
from export.tuning.search import Axis, TrialLog, TuningTrial, axes_for, best_first, searched
from runtime import Encoder
from runtime.errors import EngineError, ExportError, InputError, ManifestError
from runtime.manifest import Manifest, Modality, manifest_path
from runtime.server import Server, ServerEnvironment

START = ServingSettings(1, 0, 2, 0, 256, token_budget=2048, bucket_overhead=8)
AXES = axes_for(Modality.TEXT, 8)


def log_of(
    rate: Callable[[ServingSettings], float],
    *,
    p99_ms: Callable[[ServingSettings], float] = lambda _: 100.0,
    n: int = 99,
) -> TrialLog:
    """A stand-in for servers, which has time for ``n`` trials."""
    log = TrialLog(lambda o: TuningTrial(o, rate(o), p99_ms(o) / 2, p99_ms(o)), lambda: len(log.trials) < n)
    return log


def peaked(operation: ServingSettings) -> float:
    """Best at 4 × 2 threads, an overhead of 64 tokens and 3 front ends."""
    away = abs(np.log2(operation.tower_instances / 4)) + abs(np.log2(operation.bucket_overhead / 64))
    return 1_000 * 0.8 ** (away + abs(operation.front_instances - 3))


def test_the_search_climbs_every_axis_to_the_best() -> None:
    log = log_of(peaked)
    best = searched(START, AXES, log, limit_ms=200)
    expected = dataclasses.replace(
        START, tower_instances=4, tower_threads=2, bucket_overhead=64, front_instances=3
    )
    assert best.operation == expected
    assert len(log.trials) < 40


def test_the_search_keeps_the_limit() -> None:
    log = log_of(peaked, p99_ms=lambda o: 60.0 * o.tower_instances)
    best = searched(START, AXES, log, limit_ms=130)
    assert best.operation.tower_instances == 2
    assert any(trial.rate > best.rate for trial in log.trials.values())


def test_from_a_start_over_the_limit_the_search_finds_its_way_under_it() -> None:
    log = log_of(lambda o: 1_000.0 - 100 * o.front_instances, p99_ms=lambda o: 50.0 * o.front_instances)
    best = searched(dataclasses.replace(START, front_instances=4), AXES, log, limit_ms=110)
    assert best.operation.front_instances == 1


def test_gains_within_the_noise_change_nothing() -> None:
    log = log_of(lambda o: 1_000.0 + o.front_instances)
    assert searched(START, AXES, log, limit_ms=200).operation == START


def test_the_search_stops_when_time_is_up_with_the_best_so_far() -> None:
    log = log_of(peaked, n=3)
    best = searched(START, AXES, log, limit_ms=200)
    assert len(log.trials) == 3
    assert best is max(log.trials.values(), key=lambda trial: trial.rate)


def test_no_operation_is_measured_twice() -> None:
    measured: list[ServingSettings] = []

    def measure(operation: ServingSettings) -> TuningTrial:
        measured.append(operation)
        return TuningTrial(operation, peaked(operation), 1.0, 2.0)

    searched(START, AXES, TrialLog(measure, lambda: True), limit_ms=9)
    assert len(measured) == len(set(measured))


def test_neighbours_of_a_value_that_is_on_no_step() -> None:
    axis = Axis("fronts", ({"front_instances": 1}, {"front_instances": 4}, {"front_instances": 8}))
    above, below = axis.around(dataclasses.replace(START, front_instances=6))
    assert [o.front_instances for o in above] == [8]
    assert [o.front_instances for o in below] == [4, 1]


def test_who_fails_requests_comes_after_who_is_late() -> None:
    late, failing = TuningTrial(START, 9.0, 1, 500), TuningTrial(START, 99.0, 1, 1, failures=1)
    good = TuningTrial(START, 5.0, 1, 90)
    assert best_first([failing, late, good], 100) == [good, late, failing]


@pytest.mark.parametrize(("n", "expected"), [(5, (0, 4)), (6, (0, 5)), (9, (1, 7)), (20, (5, 14))])
def test_the_interval_is_that_of_the_binomial_distribution(n: int, expected: tuple[int, int]) -> None:
    assert median_interval([float(i) for i in range(n)]) == expected


def test_rounds_change_who_is_first() -> None:
    order: list[str] = []

    def load(server: str, seconds: float) -> Load:
        order.append(server)
        return Load(seconds, np.ones(10 if server == "a" else 20), {}, {})

    pairs = paired_loads(load, "a", "b", rounds=3, seconds=1.0)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [(one.rate, other.rate) for one, other in pairs] == [(10, 20)] * 3


@pytest.mark.parametrize(
    ("ratios", "p99_ms", "failures", "limit_ms", "better"),
    [
        ([1.2] * 8, (100, 90), (0, 0), None, True),
        ([1.2] * 7 + [0.9], (100, 90), (0, 0), None, False),
        ([1.2] * 8, (100, 110), (0, 0), None, False),
        ([1.2] * 8, (100, 110), (0, 0), 120.0, True),
        ([1.2] * 8, (100, 90), (0, 1), None, False),
        ([0.5] * 8, (100, 40), (0, 0), 50.0, True),
        ([0.5] * 8, (100, 40), (0, 0), 100.0, False),
    ],
)
def test_a_candidate_is_better_beyond_doubt_or_not_at_all(
    ratios: list[float],
    p99_ms: tuple[float, float],
    failures: tuple[int, int],
    limit_ms: float | None,
    better: bool,
) -> None:
    rates = tuple((100.0, 100.0 * ratio) for ratio in ratios)
    assert Confirmation(START, rates, p99_ms, failures).is_better(limit_ms) is better


@pytest.fixture
def model(exported: Exported, tmp_path: Path) -> Path:
    """A copy of a sample that may be changed."""
    source = exported("capivara")
    target = tmp_path / "repository"
    target.mkdir()
    shutil.copyfile(manifest_path(source), manifest_path(target / source.name))
    for folder in source.parent.glob(f"{source.name}_*"):
        if folder.is_dir() and folder.name.split("_")[0] == source.name:
            shutil.copytree(folder, target / folder.name)
    return target / source.name


@pytest.mark.parametrize("modality", Modality)
def test_an_operation_is_written_and_nothing_else(modality: Modality, model: Path) -> None:
    manifest = Manifest.read(model)
    files = tuned_files(model, manifest, modality)
    default = operation_of_model(model.parent, files)
    assert (default.tower_instances, default.tower_threads, default.front_instances) == (1, 0, 2)
    only = (
        {"token_budget": 512, "bucket_overhead": 32} if modality is Modality.TEXT else {"decode_threads": 4}
    )
    meant = ServingSettings(2, 3, 4, 700, 16, **only)
    before = {p: p.read_bytes() for p in model.parent.rglob("*") if p.is_file()}
    publish_operation(model, files, meant)
    assert operation_of_model(model.parent, files) == meant
    changed = {p for p, content in before.items() if p.read_bytes() != content}
    assert changed == {
        model.parent / files.front / "config.pbtxt",
        model.parent / files.tower / "config.pbtxt",
        manifest_path(model),
    }
    assert set(before) == {p for p in model.parent.rglob("*") if p.is_file()}
    new = Manifest.read(model)
    new.verify_front_ends(model.parent)
    new.verify(model.parent, new.variants[new.front_ends[0].variant])
    config = text_format.Parse(
        (model.parent / files.front / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 1024
    write_operation(model.parent, files, default)
    assert operation_of_model(model.parent, files) == default


def test_a_model_without_front_ends_is_told_how_to_get_them(model: Path) -> None:
    manifest = dataclasses.replace(Manifest.read(model), front_ends=())
    with pytest.raises(ExportError, match="babeltower frontends"):
        tuned_files(model, manifest, Modality.TEXT)


def test_files_that_were_changed_are_not_tuned(model: Path, server_environment: ServerEnvironment) -> None:
    config = model.parent / f"{model.name}_text" / "config.pbtxt"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ManifestError, match=r"config\.pbtxt has"):
        tuning_of_model(model, Modality.TEXT, server_environment, TuneOptions(), lambda *_: None)


def speaking(model: Path) -> Manifest:
    """The manifest of a model as if its texts needed a language."""
    manifest = Manifest.read(model)
    text = dataclasses.replace(manifest.text, prefix_ids=(), language_ids={"eng_Latn": 7, "por_Latn": 8})
    return dataclasses.replace(manifest, text=text)


def test_own_texts_are_sent_line_by_line_in_their_language(exported: Exported, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("um gato\n\n  dois gatos \n", encoding="utf-8")
    manifest = speaking(exported("capivara"))
    found = requests_for(manifest, Modality.TEXT, "m", source=source, language="por_Latn")
    assert found == text_requests("m", ["um gato", "dois gatos"], ["por_Latn", "por_Latn"])
    with pytest.raises(InputError, match="--language"):
        requests_for(manifest, Modality.TEXT, "m", source=source, language=None)


def test_texts_of_the_samples_name_languages_that_the_tower_knows(exported: Exported) -> None:
    assert languages_for(speaking(exported("capivara")), ["por_Latn", "zho_Hans"]) == ["por_Latn", "eng_Latn"]
    assert languages_for(Manifest.read(exported("capivara")), ["por_Latn"]) == [None]


@pytest.mark.parametrize("modality", Modality)
def test_nothing_to_send_is_said(modality: Modality, exported: Exported, tmp_path: Path) -> None:
    source = tmp_path / "empty"
    if modality is Modality.TEXT:
        source.write_text("\n")
    else:
        source.mkdir()
    with pytest.raises(InputError, match="contains no"):
        requests_for(Manifest.read(exported("capivara")), modality, "m", source=source, language=None)


def test_images_of_the_samples_are_sent_as_files(exported: Exported) -> None:
    manifest = Manifest.read(exported("capivara"))
    found = requests_for(manifest, Modality.IMAGE, "m", source=None, language=None)
    assert len(found) == 64
    assert all(b"JFIF" in request for request in found)


def test_load_answers_each_request_with_its_own_vector(served: Server, exported: Exported) -> None:
    texts = [f"text number {i}" for i in range(40)]
    load = load_of_server(
        served.addresses.grpc, text_requests("capivara_text", texts, [None] * len(texts)), clients=8
    )
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts(texts)
    found = np.stack([load.vectors[i] for i in range(len(texts))])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert len(load.latencies_ms) == len(texts)
    assert not load.failures


def test_load_counts_what_failed_and_why(served: Server) -> None:
    requests = text_requests("capivara_text", ["a text", " "], [None, None])
    load = load_of_server(served.addresses.grpc, requests, clients=1)
    assert list(load.vectors) == [0]
    ((message, count),) = load.failures.items()
    assert count == 1
    assert message.startswith("INVALID_ARGUMENT: InputError: text 0 is empty")


def test_load_that_is_never_answered_is_an_error() -> None:
    with pytest.raises(EngineError, match="UNAVAILABLE"):
        load_of_server("127.0.0.1:9", text_requests("m", ["a"], [None]), clients=1)


def faster(self: object, default: ServingSettings) -> Tuning:
    """What a run might find."""
    candidate = dataclasses.replace(default, front_instances=3)
    trials = (TuningTrial(default, 100, 10, 20), TuningTrial(candidate, 130, 8, 15))
    found = Confirmation(candidate, ((100.0, 130.0),) * 6, (20, 15), (0, 0))
    return Tuning("capivara_text", default, trials, (found,), None, {"clients": 32, "cores": 2}, 1.0)


@pytest.mark.parametrize("writes", [False, True])
def test_a_dry_run_writes_nothing(
    writes: bool, model: Path, server_environment: ServerEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.tuning.tune._Run.tuning", faster)
    before = {p: p.read_bytes() for p in model.parent.rglob("*") if p.is_file()}
    options = TuneOptions(writes=writes)
    tuning = tuning_of_model(model, Modality.TEXT, server_environment, options, lambda *_: None)
    assert tuning.chosen is not None
    assert ({p: p.read_bytes() for p in model.parent.rglob("*") if p.is_file()} == before) is not writes


def test_a_slow_default_is_tuned_on_a_real_server(
    model: Path, server_environment: ServerEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tuned_files(model, Manifest.read(model), Modality.TEXT)
    good = operation_of_model(model.parent, files)
    publish_operation(model, files, dataclasses.replace(good, max_queue_delay_us=50_000))
    steps = ({"max_queue_delay_us": 0}, {"max_queue_delay_us": 50_000})
    monkeypatch.setattr(tune, "axes_for", lambda *_: (Axis("delay", steps),))
    options = TuneOptions(clients=4, seconds=0.5, rounds=6, minutes=5)
    done = tuning_of_model(model, Modality.TEXT, server_environment, options, lambda *_: None)
    assert done.chosen is not None
    assert done.chosen.interval[0] > 1
    assert operation_of_model(model.parent, files) == good
    Manifest.read(model).verify_front_ends(model.parent)
    stem = f"{model.name}_text.tuning"
    evidence = json.loads((model.parent / f"{stem}.json").read_text())
    assert evidence["chosen"]["max_queue_delay_us"] == 0
    assert len(evidence["confirmations"][-1]["rates"]) == 6
    assert "chosen" in (model.parent / f"{stem}.md").read_text()
    assert (model.parent / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in model.parent.parent.iterdir() if "staging" in p.name]
