"""Texts over gRPC from many clients, beside the in-process runtime on the same cores and an unbatched server.

    python -m bench.server_load REPOSITORY/NAME [REPOSITORY/NAME …] --json FILE

Every client sends one text a request and waits for its vector. Server, in-process run and clients are
held to the same cores; the clients' own cost is part of the server's figure.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.environment import environment
from export.frontends import FrontEndSettings, frontends_from_model
from runtime.encoder import Encoder
from runtime.manifest import Manifest, Modality
from runtime.server import ServerOptions, default_folder, environment_from_folder, running_server
from runtime.server.process import Server

__all__ = ["LoadResult", "realistic_texts"]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One model under load.

    Attributes:
        texts_per_s: Each run's texts a second, over gRPC.
        in_process_texts_per_s: The same texts in one call of the in-process runtime; raw runs.
        unbatched_texts_per_s: Over gRPC with ``max_batch_size`` 1 in the front end; raw runs.
        average_batch: Texts of one execution of the front end.
        tower_average_batch: Rows of one execution of the tower.
        padding_share: Padding ÷ all tokens that the tower computed.
        latency_ms: Percentiles 50, 90 and 99 of a request.
        max_error: Largest difference to the in-process vectors.
    """

    model: str
    variant: str
    clients: int
    n_texts: int
    mean_tokens: float
    texts_per_s: Sequence[float]
    in_process_texts_per_s: Sequence[float]
    unbatched_texts_per_s: Sequence[float]
    average_batch: float
    tower_average_batch: float
    padding_share: float
    latency_ms: Sequence[float]
    max_error: float

    @property
    def share_of_in_process(self) -> float:
        """Server ÷ in-process, medians."""
        return statistics.median(self.texts_per_s) / statistics.median(self.in_process_texts_per_s)

    @property
    def gain_by_batching(self) -> float:
        """Server ÷ server without batching, medians."""
        return statistics.median(self.texts_per_s) / statistics.median(self.unbatched_texts_per_s)


def realistic_texts(n_texts: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Captions of one to three names in 106 languages, drawn with a fixed seed, and their languages."""
    from samples import dataset

    captions = [(c.text, c.flores) for c in dataset.load_captions()]
    by_language: dict[str, list[str]] = {}
    for text, language in captions:
        by_language.setdefault(language, []).append(text)
    draw = random.Random(seed)
    texts, languages = [], []
    for _ in range(n_texts):
        language = draw.choice(sorted(by_language))
        texts.append(" ".join(draw.choices(by_language[language], k=draw.choice((1, 1, 2, 2, 3)))))
        languages.append(language)
    return texts, languages


async def _requests(
    address: str, model: str, texts: Sequence[str], languages: Sequence[str | None], n_clients: int
) -> tuple[np.ndarray[Any, Any], float, list[float]]:
    """Vectors in order, seconds, and each request's milliseconds."""
    from tritonclient.grpc import InferInput
    from tritonclient.grpc.aio import InferenceServerClient

    vectors: list[Any] = [None] * len(texts)
    latencies = []
    todo = iter(range(len(texts)))

    async def client_loop(client: InferenceServerClient) -> None:
        for i in todo:
            inputs = []
            for name, value in (("text", texts[i]), ("language", languages[i])):
                if value is not None:
                    tensor = InferInput(name, [1, 1], "BYTES")
                    tensor.set_data_from_numpy(np.array([[value.encode()]], dtype=np.object_))
                    inputs.append(tensor)
            started = time.perf_counter()
            answer = await client.infer(model, inputs)
            latencies.append((time.perf_counter() - started) * 1e3)
            vectors[i] = answer.as_numpy("vector")[0]

    async with InferenceServerClient(address) as client:
        started = time.perf_counter()
        await asyncio.gather(*(client_loop(client) for _ in range(n_clients)))
        return np.stack(vectors), time.perf_counter() - started, latencies


def _metric(page: str, name: str, model: str) -> float:
    lines = [line for line in page.splitlines() if line.startswith(name + "{") and f'model="{model}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def _loaded(
    server: Server, name: str, texts: Sequence[str], languages: Sequence[str | None], clients: int, runs: int
) -> tuple[list[float], list[float], np.ndarray[Any, Any], dict[str, float]]:
    import tritonclient.grpc

    model = f"{name}_text"
    warm = min(len(texts), 4 * clients)
    asyncio.run(_requests(server.addresses.grpc, model, texts[:warm], languages[:warm], clients))
    client = tritonclient.grpc.InferenceServerClient(server.addresses.grpc)
    tower = client.get_model_config(model).config.parameters["babeltower_tower"].string_value

    def counts() -> dict[str, float]:
        time.sleep(1.5)
        page = server.metrics()
        found = {n: _metric(page, f"babeltower_{n}_total", model) for n in ("tokens", "padding_tokens")}
        for key, of in (("front", model), ("tower", tower)):
            stats = client.get_inference_statistics(of).model_stats[0]
            found |= {f"{key}_rows": stats.inference_count, f"{key}_runs": stats.execution_count}
        return found

    before = counts()
    rates, latencies = [], []
    for _ in range(runs):
        vectors, seconds, run_latencies = asyncio.run(
            _requests(server.addresses.grpc, model, texts, languages, clients)
        )
        rates.append(len(texts) / seconds)
        latencies += run_latencies
    after = counts()
    return rates, latencies, vectors, {key: after[key] - before[key] for key in after}


def measure(
    model: Path, server_environment: Path, *, clients: int, n_texts: int, runs: int, threads: int
) -> LoadResult:
    """One model: in process, on a server, on a server that does not batch; one after the other."""
    manifest = Manifest.read(model)
    (front_ends,) = manifest.front_ends
    variant = manifest.variants[front_ends.variant]
    texts, given = realistic_texts(n_texts)
    known = manifest.text.language_ids
    languages = [(code if code in known else "eng_Latn") if known else None for code in given]
    engine = variant.engines[0] if len(variant.engines) == 1 else "onnxruntime"
    in_process = []
    with Encoder.open(
        model, engine=engine, precision=variant.precision, threads=threads, verify=False
    ) as encoder:
        language = [code for code in languages if code is not None] or None
        encoder.embed_texts(texts[:64], language and language[:64])
        for _ in range(runs):
            started = time.perf_counter()
            expected = encoder.embed_texts(texts, language)
            in_process.append(n_texts / (time.perf_counter() - started))
        mean_tokens = encoder.stats.tokens / encoder.stats.texts
    towers = [front_ends.text, variant.text.model]
    options = ServerOptions(models=tuple(towers))
    found = {}
    with tempfile.TemporaryDirectory(dir=model.parent.parent) as scratch:
        plain = _linked(model, Path(scratch) / "plain")
        one = dataclasses.replace(FrontEndSettings(), max_batch_size=dict.fromkeys(Modality, 1))
        frontends_from_model(plain, variant=front_ends.variant, settings=one)
        for kind, repository in (("batched", model.parent), ("plain", plain.parent)):
            environment_ = environment_from_folder(server_environment)
            with running_server(repository, environment=environment_, options=options) as server:
                found[kind] = _loaded(server, model.name, texts, languages, clients, runs)
    rates, latencies, vectors, counts = found["batched"]
    tokens, padding = counts["tokens"], counts["padding_tokens"]
    return LoadResult(
        model=model.name,
        variant=front_ends.variant,
        clients=clients,
        n_texts=n_texts,
        mean_tokens=mean_tokens,
        texts_per_s=rates,
        in_process_texts_per_s=in_process,
        unbatched_texts_per_s=found["plain"][0],
        average_batch=counts["front_rows"] / counts["front_runs"],
        tower_average_batch=counts["tower_rows"] / counts["tower_runs"],
        padding_share=padding / (tokens + padding),
        latency_ms=[float(p) for p in np.percentile(latencies, (50, 90, 99))],
        max_error=float(np.abs(vectors - expected).max()),
    )


def _linked(model: Path, repository: Path) -> Path:
    """A copy of the repository that shares the towers' files."""
    import os

    shutil.copytree(
        model.parent,
        repository,
        copy_function=lambda a, b: os.link(a, b),
        ignore=lambda _, names: [n for n in names if n.endswith((".refused.json",))],
    )
    path = repository / f"{model.name}.babeltower.json"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    path.write_text(text, encoding="utf-8")
    return repository / model.name


def main(
    models: Annotated[list[Path], typer.Argument(metavar="REPOSITORY/NAME…")],
    env: Annotated[Path | None, typer.Option(envvar="BABELTOWER_SERVER_ENV")] = None,
    clients: Annotated[int, typer.Option(min=1)] = 32,
    n_texts: Annotated[int, typer.Option(min=64)] = 2_000,
    runs: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of the in-process run.")] = 2,
    record: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Measure texts a second, batches and padding under load."""
    results = []
    for model in models:
        result = measure(
            model, env or default_folder(), clients=clients, n_texts=n_texts, runs=runs, threads=threads
        )
        results.append(result)
        typer.echo(
            f"{result.model} {result.variant}: {statistics.median(result.texts_per_s):.0f} texts/s, "
            f"{result.share_of_in_process:.0%} of in-process, {result.gain_by_batching:.2f}× unbatched, "
            f"batch {result.average_batch:.1f}, tower batch {result.tower_average_batch:.1f}, "
            f"padding {result.padding_share:.1%}, p50/90/99 {[round(x) for x in result.latency_ms]} ms, "
            f"error {result.max_error:.1e}"
        )
    if record is not None:
        data = {
            "environment": asdict(environment()),
            "results": [
                {
                    **asdict(r),
                    "share_of_in_process": r.share_of_in_process,
                    "gain_by_batching": r.gain_by_batching,
                }
                for r in results
            ],
        }
        record.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
