"""Measure a server under closed-loop gRPC load, beside the in-process runtime and an unbatched server.

    python -m bench.server_load REPOSITORY/NAME [REPOSITORY/NAME …] --json FILE

Every client sends one text per request and waits for its vector. Servers, in-process runs and clients share
the same cores, so the clients' own cost is part of a server's figure. Both servers and the encoder stay up,
and are measured in turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from numpy.typing import NDArray

from bench.records.record import Record, artefact_sha256, record_of, suite_cell, write_records
from export.tuning.inputs import languages_for, realistic_texts
from export.tuning.load_generator import Load, text_requests
from export.tuning.operation import ServingSettings, TunedFiles, operation_of_model, tuned_files
from export.tuning.trial_server import TrialModel
from runtime.encoder import Encoder
from runtime.manifest import Manifest, Modality
from runtime.server import Server, default_folder, environment_from_folder

__all__ = ["LoadResult", "realistic_texts", "records_of_result"]

SERVER, UNBATCHED = "babeltower server", "babeltower server, unbatched"
IN_PROCESS, AT_A_TIME = "babeltower in process", "babeltower in process, as many at a time"
_PAUSE_S = 0.5
"""Pause before every stretch, so that it is not affected by the one before."""
_METRICS_S = 6.0
"""Wait for the front ends, which publish their counters every five seconds."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Results of one model under load.

    Attributes:
        rates: Texts per second of each run, by way: the server, the server without batching, one in-process
            call with all texts, and in-process calls with as many texts as there are clients, which is as
            many as the server has at a time.
        average_batch: Texts per execution of the front end.
        tower_average_batch: Rows per execution of the tower.
        padding_share: Padding ÷ all tokens that the tower computed.
        latency_ms: Percentiles 50, 90 and 99 of a request, for the server and the unbatched one.
        max_error: Largest difference to the in-process vectors.
    """

    model: str
    manifest: Manifest
    files: TunedFiles
    operation: ServingSettings
    clients: int
    n_texts: int
    mean_tokens: float
    rates: Mapping[str, Sequence[float]]
    average_batch: float
    tower_average_batch: float
    padding_share: float
    latency_ms: Mapping[str, Sequence[float]]
    max_error: float

    def share_of(self, way: str) -> float:
        """Return server ÷ a way in process, medians."""
        return statistics.median(self.rates[SERVER]) / statistics.median(self.rates[way])

    @property
    def gain_by_batching(self) -> float:
        """Server ÷ server without batching, medians."""
        return self.share_of(UNBATCHED)

    def __str__(self) -> str:
        return (
            f"{self.model} {self.files.tower}: {statistics.median(self.rates[SERVER]):.0f} texts/s, "
            f"{self.share_of(IN_PROCESS):.0%} of in-process with all texts and "
            f"{self.share_of(AT_A_TIME):.0%} with {self.clients} at a time, "
            f"{self.gain_by_batching:.2f}× unbatched, batch {self.average_batch:.1f}, tower batch "
            f"{self.tower_average_batch:.1f}, padding {self.padding_share:.1%}, p50/90/99 "
            f"{[round(x) for x in self.latency_ms[SERVER]]} ms, error {self.max_error:.1e}"
        )


@dataclass(frozen=True, slots=True)
class _Turns:
    """Measurements in turns; ``counts`` are the batched server's, over all runs."""

    loads: Mapping[str, Sequence[Load]]
    in_process: Mapping[str, Sequence[float]]
    expected: NDArray[np.float32]
    counts: Mapping[str, float]


def measure(
    model: Path, server_environment: Path, *, clients: int, n_texts: int, runs: int, threads: int
) -> LoadResult:
    """Measure one model in turns: on a server, on one that does not batch, and in process."""
    manifest = Manifest.read(model)
    files = tuned_files(model, manifest, Modality.TEXT)
    operation = operation_of_model(model.parent, files)
    texts, codes = realistic_texts(n_texts)
    languages = languages_for(manifest, codes)
    precision = manifest.variants[manifest.front_ends[0].variant].precision
    with (
        tempfile.TemporaryDirectory(dir=model.parent.parent) as stage,
        Encoder.open(model, engine=files.engine, precision=precision, threads=threads) as encoder,
    ):
        served = TrialModel(
            model.parent,
            files,
            environment_from_folder(server_environment),
            Path(stage),
            text_requests(files.front, texts, languages),
            clients,
        )
        turns = _turns(served, operation, encoder, texts, languages, runs)
        mean_tokens = encoder.stats.tokens / encoder.stats.texts
    counts = turns.counts
    return LoadResult(
        model=model.name,
        manifest=manifest,
        files=files,
        operation=operation,
        clients=clients,
        n_texts=n_texts,
        mean_tokens=mean_tokens,
        rates={
            **{way: [load.rate for load in found] for way, found in turns.loads.items()},
            **turns.in_process,
        },
        average_batch=counts["front_rows"] / counts["front_runs"],
        tower_average_batch=counts["front_rows"] / counts["tower_calls"],
        padding_share=counts["padding_tokens"] / (counts["tokens"] + counts["padding_tokens"]),
        latency_ms={way: _percentiles(found) for way, found in turns.loads.items()},
        max_error=_max_error(turns.loads[SERVER], turns.expected),
    )


def _turns(
    served: TrialModel,
    operation: ServingSettings,
    encoder: Encoder,
    texts: Sequence[str],
    languages: Sequence[str | None],
    runs: int,
) -> _Turns:
    known = [code for code in languages if code is not None] or None
    loads: dict[str, list[Load]] = {SERVER: [], UNBATCHED: []}
    at_a_time = {IN_PROCESS: len(texts), AT_A_TIME: served.clients}
    in_process: dict[str, list[float]] = {way: [] for way in at_a_time}
    with (
        served.serving(operation, warm_s=5) as batched,
        served.serving(replace(operation, max_batch_size=1), warm_s=3) as unbatched,
    ):
        expected = encoder.embed_texts(texts, known)
        before = _counts(batched, served.files)
        for _ in range(runs):
            for way, server in ((SERVER, batched), (UNBATCHED, unbatched)):
                time.sleep(_PAUSE_S)
                loads[way].append(served.load(server, None))
            for way, size in at_a_time.items():
                time.sleep(_PAUSE_S)
                started = time.perf_counter()
                for at in range(0, len(texts), size):
                    part = slice(at, at + size)
                    encoder.embed_texts(texts[part], known and known[part])
                in_process[way].append(len(texts) / (time.perf_counter() - started))
        after = _counts(batched, served.files)
    counts = {key: after[key] - before[key] for key in after}
    return _Turns(loads, in_process, expected, counts)


def records_of_result(result: LoadResult, model: Path) -> list[Record]:
    """Return the suite's cells: the server, the server without batching, the runtime in process."""
    variant = result.manifest.variants[result.manifest.front_ends[0].variant]
    tower = variant.text
    folder = model.parent / tower.model / str(tower.version)
    artefact = artefact_sha256(*sorted(path for path in folder.iterdir() if path.is_file()))
    common = {
        "clients": result.clients,
        "n_texts": result.n_texts,
        "mean_tokens": result.mean_tokens,
        "operation": asdict(result.operation),
    }
    server = {
        "average_batch": result.average_batch,
        "tower_average_batch": result.tower_average_batch,
        "padding_share": result.padding_share,
        "max_error": result.max_error,
        "share_of_in_process": result.share_of(IN_PROCESS),
        "share_of_as_many_at_a_time": result.share_of(AT_A_TIME),
        "gain_by_batching": result.gain_by_batching,
    }
    return [
        record_of(
            suite_cell(
                suite="server",
                metric="rate",
                model=result.model,
                family=result.manifest.family,
                tower="text",
                by=by,
                engine=result.files.engine,
                precision=variant.precision.value,
            ),
            result.rates[by],
            unit="rows/s",
            settings={**common, **settings},
            artefact=artefact,
        )
        for by, settings in (
            (SERVER, {**server, **_latency(result, SERVER)}),
            (UNBATCHED, _latency(result, UNBATCHED)),
            (IN_PROCESS, {}),
            (AT_A_TIME, {}),
        )
    ]


def _latency(result: LoadResult, way: str) -> dict[str, Any]:
    return dict(zip(("p50_ms", "p90_ms", "p99_ms"), result.latency_ms[way], strict=True))


def _percentiles(loads: Sequence[Load]) -> list[float]:
    joined = np.concatenate([load.latencies_ms for load in loads])
    return [float(p) for p in np.percentile(joined, (50, 90, 99))]


def _max_error(loads: Sequence[Load], expected: NDArray[Any]) -> float:
    return max(float(np.abs(v - expected[i]).max()) for load in loads for i, v in load.vectors.items())


def _counts(server: Server, files: TunedFiles) -> dict[str, float]:
    import tritonclient.grpc

    time.sleep(_METRICS_S)
    page = server.metrics()
    names = ("tokens", "padding_tokens", "tower_calls")
    found = {name: _metric(page, f"babeltower_{name}_total", files.front) for name in names}
    client = tritonclient.grpc.InferenceServerClient(server.addresses.grpc)
    stats = client.get_inference_statistics(files.front).model_stats[0]
    client.close()
    return found | {"front_rows": stats.inference_count, "front_runs": stats.execution_count}


def _metric(page: str, name: str, model: str) -> float:
    lines = [line for line in page.splitlines() if line.startswith(name + "{") and f'model="{model}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def main(
    models: Annotated[list[Path], typer.Argument(metavar="REPOSITORY/NAME…")],
    env: Annotated[Path | None, typer.Option(envvar="BABELTOWER_SERVER_ENV")] = None,
    clients: Annotated[int, typer.Option(min=1)] = 32,
    n_texts: Annotated[int, typer.Option(min=64)] = 800,
    runs: Annotated[int, typer.Option(min=1)] = 6,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the in-process run.")] = 2,
    record: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
) -> None:
    """Measure texts a second, batches and padding under load."""
    records: list[Record] = []
    for model in models:
        result = measure(
            model, env or default_folder(), clients=clients, n_texts=n_texts, runs=runs, threads=threads
        )
        records += records_of_result(result, model)
        typer.echo(str(result))
        if record is not None:
            write_records(records, record)


if __name__ == "__main__":
    typer.run(main)
