"""Peers: the processes they run in, what is refused before a time counts, and what the ratios say."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sample_models import CHECKPOINTS, ROOT, Exported

from bench.peers.environments import ENVIRONMENTS, pins_of, python_of
from bench.peers.measure import measure_case, processes, require_equal
from bench.peers.models import given_model
from bench.peers.process import PeerError, PeerProcess
from bench.peers.registry import OWN, PEERS, Peer, Stage
from bench.peers.verdicts import ANY, verdicts_of
from bench.records.record import Record, record_of, suite_cell
from runtime.errors import BabeltowerError
from runtime.manifest import Modality, Precision

ISOLATED = ROOT / "bench" / "peers" / "isolated"
FAKE = """
import numpy as np

def opened(task):
    if task["tower"] == "image":
        raise ValueError("takes no images\\nat all, see /somewhere/else/config.json and https://x.org/a/b")

    def run(inputs):
        if inputs["rows"][0] < 0:
            raise SystemExit(7)
        print("chatter")
        return np.stack([inputs["rows"], inputs["rows"]], axis=1) * float(task["factor"])

    return run
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[PeerProcess]:
    shutil.copytree(ISOLATED, tmp_path / "isolated")
    (tmp_path / "isolated" / "loops" / "fake.py").write_text(FAKE)
    with PeerProcess(Path(sys.executable), "fake", worker=tmp_path / "isolated" / "worker.py") as process:
        yield process


def rows_in(folder: Path, *values: float) -> Path:
    np.savez(folder / "rows.npz", rows=np.array(values, dtype=np.float32))
    return folder / "rows.npz"


def test_a_process_opens_runs_and_times(fake: PeerProcess, tmp_path: Path) -> None:
    fake.open("m/text", {"tower": "text", "factor": 3})
    rows = rows_in(tmp_path, 1, 2)
    assert fake.vectors("m/text", rows).tolist() == [[3, 3], [6, 6]]
    cpu_s, wall_s = fake.seconds("m/text", rows, 5)
    assert cpu_s >= 0
    assert wall_s > 0


def test_an_error_is_a_line_without_folders_and_the_process_goes_on(
    fake: PeerProcess, tmp_path: Path
) -> None:
    with pytest.raises(PeerError) as found:
        fake.open("m/image", {"tower": "image"})
    assert str(found.value) == ("ValueError: takes no images at all, see …/config.json and https://x.org/a/b")
    with pytest.raises(PeerError, match="KeyError"):
        fake.vectors("m/image", rows_in(tmp_path, 1))
    fake.open("m/text", {"tower": "text", "factor": 1})
    assert fake.is_alive


def test_a_process_that_ends_is_an_error(fake: PeerProcess, tmp_path: Path) -> None:
    fake.open("m/text", {"tower": "text", "factor": 1})
    with pytest.raises(PeerError, match="the process of fake ended"):
        fake.vectors("m/text", rows_in(tmp_path, -1))
    assert not fake.is_alive


def test_other_vectors_are_refused() -> None:
    peer = PEERS[0]
    reference = np.eye(3, dtype=np.float32)
    assert require_equal(2 * reference, reference, peer) == pytest.approx(1)
    with pytest.raises(PeerError, match=r"cosine 0\.\d+, expected at least 0.999999 in fp32"):
        require_equal(reference + 0.1, reference, peer)
    with pytest.raises(PeerError, match=r"gave vectors \[2, 3\]; expected \[3, 3\]"):
        require_equal(reference[:2], reference, peer)
    with pytest.raises(PeerError, match="cosine nan"):
        require_equal(reference * np.nan, reference, peer)


def test_every_peer_has_its_loop_and_pinned_environment() -> None:
    assert len({peer.key for peer in (*OWN, *PEERS)}) == len(OWN) + len(PEERS)
    for peer in PEERS:
        assert (ISOLATED / "loops" / f"{peer.loop}.py").is_file()
        assert peer.environment in ENVIRONMENTS
        pins = pins_of(str(peer.environment))
        assert pins
        assert all(version for version in pins.values())
    with pytest.raises(BabeltowerError, match="No environment 'none'"):
        python_of("none", Path("nowhere"), print)


def record(by: str, precision: str, *samples: float, error: str | None = None) -> Record:
    cell = suite_cell(
        suite="peers",
        metric="cpu",
        model="m",
        family="f",
        tower="text",
        by=by,
        engine="e",
        precision=precision,
        batch=8,
        tokens=16,
    )
    return record_of(cell, samples, unit="ms", settings={}, error=error)


def test_verdicts_compare_within_turns_at_equal_precision_and_at_any() -> None:
    ours = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    records = [
        record("babeltower", "fp32", *ours),
        record("babeltower", "int8", *(x / 4 for x in ours)),
        record("slow", "fp32", *(1.5 * x for x in ours)),
        record("fast", "fp32", *(0.5 * x for x in ours)),
        record("broken", "int8", error="no such thing"),
    ]
    found = {(v.peer.cell["by"], v.precision): v for v in verdicts_of(records)}
    assert found.keys() == {("slow", "fp32"), ("fast", "fp32"), ("fast", ANY)}
    assert found["slow", "fp32"].ratio == pytest.approx(1.5)
    assert found["slow", "fp32"].word == "ahead"
    assert found["fast", "fp32"].word == "behind"
    assert found["fast", ANY].ratio == pytest.approx(2.0)
    noisy = [record("babeltower", "fp32", *ours), record("even", "fp32", *reversed(ours))]
    assert verdicts_of(noisy)[0].word == "even"
    with pytest.raises(BabeltowerError, match="babeltower was not measured"):
        verdicts_of([record("slow", "fp32", 1.0)])


def test_pytorch_beside_this_project(exported: Exported, tmp_path: Path) -> None:
    model = exported("nllb-clip")
    given = given_model(CHECKPOINTS / "nllb-clip", model, tmp_path / "given", batches=(2,))
    own = next(p for p in OWN if p.engine == "onnxruntime" and p.stage is Stage.PREPARED)
    eager = Peer("PyTorch", None, "pytorch", "torch", Precision.FP32, Stage.PREPARED, {"mode": "eager"})
    wrong = Peer("none", None, "no_such_loop", "torch", Precision.FP32, Stage.PREPARED)
    peers = [own, eager, wrong]
    for modality in Modality:
        case = next(c for c in given.cases if c.modality is modality and c.stage is Stage.PREPARED)
        with processes(tmp_path, lambda line: None) as running:
            running.open(peers, given, modality)
            ours, theirs, failed = measure_case(peers, running, given, case, turns=3)
        assert ours.error is None
        assert theirs.error is None
        assert theirs.settings["min_cosine"] > 0.999999
        assert len(theirs.samples) == 3
        assert "no_such_loop" in str(failed.error)
