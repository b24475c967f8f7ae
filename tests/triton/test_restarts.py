"""Restarts under load: what runs is answered, later requests are UNAVAILABLE, our clients lose nothing.

``BABELTOWER_RESTARTS`` is the number of restarts; the default is a few, for a run of minutes.
"""

from __future__ import annotations

import collections
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from altered_models import copied
from corpus_runs import output_of
from sample_models import Exported
from serving import Serving, wait_until
from traffic import Traffic
from tritonclient.utils import InferenceServerException

from runtime import Encoder
from runtime.corpus import EngineChoice, Options, embed_corpus
from runtime.draining import DRAIN_VARIABLE, drained
from runtime.errors import UnansweredError
from runtime.probes import Probes
from runtime.remote import Connection
from runtime.server import Server, ServerEnvironment, ServerOptions, running_server

NAME = "nllb-clip"
N_RESTARTS = int(os.environ.get("BABELTOWER_RESTARTS", "3"))
PATIENT = Connection(retry_for_s=120, texts_per_request=4, concurrency=4)


@pytest.fixture(scope="module")
def model(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(exported(NAME), tmp_path_factory.mktemp("restarted") / "models")


class Restarting:
    """A server that is stopped and started again at the same ports, as often as it is asked to."""

    def __init__(self, model: Path, environment: ServerEnvironment) -> None:
        self._model, self._environment = model, environment
        self.options = ServerOptions()

    def run(self, while_served: Any) -> None:
        """Start the server, call the function with it, and stop it gracefully."""
        with running_server(
            self._model.parent, environment=self._environment, options=self.options
        ) as server:
            http, grpc, metrics = (
                int(address.rpartition(":")[2])
                for address in (server.addresses.http, server.addresses.grpc, server.addresses.metrics)
            )
            self.options = ServerOptions(http_port=http, grpc_port=grpc, metrics_port=metrics)
            while_served(server)


def test_our_clients_lose_nothing_over_restarts(
    model: Path, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    probes = Probes.read(model)
    server = Restarting(model, server_environment)
    server.run(lambda _: None)  # picks the ports
    texts = [f"{text} {i}" for i, text in enumerate(probes.texts[:400]) if text.strip()]
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(text.split()) for text in texts))
    corpora: list[Any] = []
    last_one = threading.Event()
    ports = server.options
    grpc, http = f"grpc://127.0.0.1:{ports.grpc_port}/{NAME}", f"http://127.0.0.1:{ports.http_port}/{NAME}"

    def embed() -> None:
        options = Options(language="por_Latn", rows_per_part=40, engine=EngineChoice())
        while not last_one.is_set():
            folder = tmp_path / f"vectors-{len(corpora)}"
            corpora.append(embed_corpus(grpc, tmp_path / "texts.txt", folder, options))

    loads: list[Traffic] = []

    def begin(_: Server) -> None:
        loads.extend(Traffic(address, probes, PATIENT, every=40).__enter__() for address in (grpc, http))
        for load in loads:
            load.wait_for_more()

    server.run(begin)
    embedding = threading.Thread(target=embed)
    for i in range(N_RESTARTS):

        def served(_: Server, i: int = i) -> None:
            if i == 0:
                embedding.start()
            for load in loads:
                load.wait_for_more()

        server.run(served)

    def end(_: Server) -> None:
        last_one.set()
        embedding.join()
        for load in loads:
            load.__exit__()

    server.run(end)
    assert [load.errors for load in loads] == [[], []]
    with Encoder.open(model, threads=1) as local:
        lines = (tmp_path / "texts.txt").read_text().splitlines()
        expected = local.embed_texts(lines, "por_Latn")
    assert corpora
    for i, corpus in enumerate(corpora):
        ids, vectors = output_of(tmp_path / f"vectors-{i}")
        assert (len(ids), corpus.bad_kinds) == (len(texts), {})
        assert np.abs(vectors - expected).max() <= 1e-5


@pytest.fixture
def raw_answers() -> Iterator[Any]:
    """Start raw clients, which retry nothing; at the end, count their answers by status."""
    done = threading.Event()
    threads: list[threading.Thread] = []

    def start(module: Any, address: str) -> collections.Counter[str]:
        counts: collections.Counter[str] = collections.Counter()

        def run() -> None:
            client = module.InferenceServerClient(address)
            text, language = (module.InferInput(name, [8, 1], "BYTES") for name in ("text", "language"))
            text.set_data_from_numpy(np.array([[f"um gato {i}".encode()] for i in range(8)], np.object_))
            language.set_data_from_numpy(np.array([[b"por_Latn"]] * 8, np.object_))
            while not done.is_set():
                try:
                    client.infer(f"{NAME}_text", [text, language])
                    counts["answered"] += 1
                except InferenceServerException as error:
                    counts[str(error.status())] += 1
                except OSError:  # HTTP has no word for a connection that is refused or closed
                    counts["unreachable"] += 1
                except Exception as error:
                    counts[f"{type(error).__name__}: {error}"] += 1

        threads.extend(threading.Thread(target=run) for _ in range(4))
        for thread in threads[-4:]:
            thread.start()
        return counts

    yield start, done, threads
    done.set()
    for thread in threads:
        thread.join()


def test_raw_clients_see_nothing_but_unavailable(
    model: Path, server_environment: ServerEnvironment, raw_answers: Any
) -> None:
    start, done, threads = raw_answers
    with running_server(model.parent, environment=server_environment) as server:
        grpc = start(tritonclient.grpc, server.addresses.grpc)
        http = start(tritonclient.http, server.addresses.http)
        wait_until(lambda: grpc["answered"] > 50 and http["answered"] > 50, "requests are answered")
        server.stop()
        time.sleep(0.2)  # some more requests to a server that is gone
    done.set()
    for thread in threads:
        thread.join()
    assert set(grpc) == {"answered", "StatusCode.UNAVAILABLE"}
    assert set(http) <= {"answered", "503", "unreachable", "HTTPConnectionClosed: connection closed."}
    assert http["503"] > 0


def test_sigterm_lets_serve_answer_what_runs(model: Path, server_environment: ServerEnvironment) -> None:
    ports = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")
    with Serving(model.parent, server_environment, *ports) as serving:
        serving.wait_until_served()
        answered: list[int] = []
        client = tritonclient.grpc.InferenceServerClient(serving.address("grpc").removeprefix("grpc://"))
        text, language = (
            tritonclient.grpc.InferInput(name, [64, 1], "BYTES") for name in ("text", "language")
        )
        text.set_data_from_numpy(np.array([[b"gato " * 60]] * 64, np.object_))
        language.set_data_from_numpy(np.array([[b"por_Latn"]] * 64, np.object_))
        running = threading.Thread(
            target=lambda: answered.append(
                len(client.infer(f"{NAME}_text", [text, language]).as_numpy("vector"))
            )
        )
        running.start()
        wait_until(lambda: pending_or_done(client, answered), "the request is running")
        serving.process.send_signal(signal.SIGTERM)
        running.join()
        assert answered == [64]
        assert serving.process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_while_models_load_is_no_failed_start(
    number: signal.Signals, model: Path, server_environment: ServerEnvironment
) -> None:
    ports = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")
    with Serving(model.parent, server_environment, *ports) as serving:
        wait_until(lambda: serving.children, "Triton is started")
        serving.process.send_signal(number)
        assert serving.process.wait(60) == 0
    assert not [line for line in serving.lines if line.startswith(("error", "metrics "))]


def pending_or_done(client: Any, answered: list[int]) -> bool:
    """Whether the request of 64 texts has reached its tower, or was answered already."""
    stats = client.get_inference_statistics(f"{NAME}_text_tower_fp32").model_stats[0]
    return bool(answered) or stats.inference_count > 0


def test_a_server_is_not_drained_by_what_drained_a_former_one(
    model: Path, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    """Where the folder outlives a server, as a volume outlives a container."""
    assert drained(tmp_path, 1)
    assert (tmp_path / "stop-front-ends").exists()
    options = ServerOptions(environment={DRAIN_VARIABLE: str(tmp_path)})
    with running_server(model.parent, environment=server_environment, options=options) as server:
        with Encoder.open(f"grpc://{server.addresses.grpc}/{NAME}") as encoder:
            assert encoder.embed_texts(["gato"], "por_Latn").shape == (1, encoder.dim)
        assert drained(tmp_path, 30)
        hasty = Connection(retry_for_s=0)
        with (
            Encoder.open(f"grpc://{server.addresses.grpc}/{NAME}", connection=hasty) as encoder,
            pytest.raises(UnansweredError, match="The server is stopping"),
        ):
            encoder.embed_texts(["gato"], "por_Latn")
