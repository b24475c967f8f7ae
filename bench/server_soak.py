"""Thousands of requests, some of them bad, to one server: is every answer right, and does memory stay flat?

    python -m bench.server_soak REPOSITORY/NAME --requests 10000 --minutes 10 --json FILE --plot FILE

Texts and images are sent at an even rate. Every twentieth request is bad in one of eight ways and must be
answered INVALID_ARGUMENT; every other with the vector of the in-process runtime.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from bench.environment import environment
from bench.server_load import realistic_texts
from runtime.encoder import Encoder
from runtime.manifest import Manifest
from runtime.server import ServerOptions, default_folder, environment_from_folder, running_server

__all__ = ["Request", "SoakResult"]

_BAD_EVERY = 20


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent, and what must come back: a vector, or INVALID_ARGUMENT if ``None``."""

    model: str
    inputs: dict[str, Any]
    kind: str
    expected: Any


@dataclass(slots=True)
class SoakResult:
    """``memory`` holds seconds since the start and resident bytes of the server and its models."""

    n_requests: int = 0
    n_good: int = 0
    n_good_right: int = 0
    n_bad: int = 0
    n_bad_refused: int = 0
    max_error: float = 0.0
    seconds: float = 0.0
    bad_kinds: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    messages: dict[str, str] = field(default_factory=dict)
    processes_at_start: list[int] = field(default_factory=list)
    processes_at_end: list[int] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    @property
    def growth_bytes_per_min(self) -> float:
        """Slope of a line through the second half of the memory's samples."""
        half = np.asarray(self.memory[len(self.memory) // 2 :], dtype=np.float64)
        return float(np.polyfit(half[:, 0] / 60, half[:, 1], 1)[0]) if len(half) > 1 else 0.0


def _bytes(*values: bytes) -> Any:
    return np.array([[value] for value in values], dtype=np.object_)


def _bad_requests(name: str, language: bool) -> list[Request]:
    """One of each way to be wrong."""
    bomb = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(bomb, "PNG")
    text, image = f"{name}_text", f"{name}_image"
    named = {"language": _bytes(b"por_Latn")} if language else {}
    return [
        Request(image, {"image": _bytes(b"\x89PNG\r\n\x1a\nbroken")}, "corrupt image", None),
        Request(image, {"image": _bytes(b"")}, "empty image", None),
        Request(image, {"image": _bytes(bomb.getvalue())}, "huge image", None),
        Request(text, {"text": _bytes(b"x" * 100_000), **named}, "huge text", None),
        Request(text, {"text": _bytes(b"  "), **named}, "empty text", None),
        Request(text, {"text": np.array([[1]], np.int32), **named}, "wrong type", None),
        Request(text, {"text": _bytes(b"\xff\xfe"), **named}, "no UTF-8", None),
        Request(text, {"text": _bytes(b"gato"), "language": _bytes(b"xx-Nope")}, "unknown language", None),
    ]


def _requests(model: Path, n_requests: int) -> list[Request]:
    from samples import dataset

    manifest = Manifest.read(model)
    name, known = manifest.name, manifest.text.language_ids
    texts, given = realistic_texts(500)
    languages = [code if not known or code in known else "eng_Latn" for code in given]
    images = [drawing.png for drawing in dataset.load_gallery()[:100]]
    (front_ends,) = manifest.front_ends
    variant = manifest.variants[front_ends.variant]
    with Encoder.open(model, engine=variant.engines[0], precision=variant.precision, threads=2) as encoder:
        text_vectors = encoder.embed_texts(texts, languages)
        image_vectors = encoder.embed_images(images)
    bad = _bad_requests(name, bool(known))
    draw = random.Random(0)
    found = []
    for i in range(n_requests):
        if i % _BAD_EVERY == _BAD_EVERY - 1:
            found.append(bad[(i // _BAD_EVERY) % len(bad)])
        elif draw.random() < 0.2:
            k = draw.randrange(len(images))
            found.append(Request(f"{name}_image", {"image": _bytes(images[k])}, "image", image_vectors[k]))
        else:
            k = draw.randrange(len(texts))
            inputs = {"text": _bytes(texts[k].encode()), "language": _bytes(languages[k].encode())}
            found.append(Request(f"{name}_text", inputs, "text", text_vectors[k]))
    return found


def _processes(leader: int) -> list[int]:
    """The server and its Python models, by their process group."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and int((folder / "stat").read_text().rsplit(")", 1)[1].split()[2]) == leader
            ):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return sorted(found)


def _resident_bytes(processes: Sequence[int]) -> int:
    """Proportional set size, so that what processes share counts once."""
    total = 0
    for pid in processes:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total


async def _soak(address: str, requests: Sequence[Request], pid: int, minutes: float) -> SoakResult:
    from tritonclient.grpc import InferInput
    from tritonclient.grpc.aio import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    result = SoakResult(n_requests=len(requests), processes_at_start=_processes(pid))
    started = time.perf_counter()

    async def send(client: InferenceServerClient, request: Request) -> None:
        tensors = []
        for name, array in request.inputs.items():
            tensor = InferInput(name, list(array.shape), "INT32" if array.dtype == np.int32 else "BYTES")
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        try:
            vector = (await client.infer(request.model, tensors)).as_numpy("vector")[0]
            _compare(result, request, vector)
        except InferenceServerException as error:
            _refused(result, request, str(error.status()), str(error.message()))

    async def watch() -> None:
        while True:
            result.memory.append((time.perf_counter() - started, _resident_bytes(_processes(pid))))
            await asyncio.sleep(5)

    async with InferenceServerClient(address) as client:
        watching = asyncio.create_task(watch())
        pending = set()
        for i, request in enumerate(requests):
            due = started + i * minutes * 60 / len(requests)
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            pending.add(task := asyncio.create_task(send(client, request)))
            task.add_done_callback(pending.discard)
        await asyncio.gather(*pending)
        watching.cancel()
    result.seconds = time.perf_counter() - started
    result.processes_at_end = _processes(pid)
    return result


def _compare(result: SoakResult, request: Request, vector: Any) -> None:
    if request.expected is None:
        result.n_bad += 1
        result.surprises.append(f"{request.kind} was answered with a vector")
        return
    result.n_good += 1
    error = float(np.abs(vector - request.expected).max())
    result.max_error = max(result.max_error, error)
    result.n_good_right += error <= 1e-6


def _refused(result: SoakResult, request: Request, status: str, message: str) -> None:
    if request.expected is not None:
        result.n_good += 1
        result.surprises.append(f"{request.kind} failed: {status} {message}")
        return
    result.n_bad += 1
    result.bad_kinds[request.kind] += 1
    result.messages[request.kind] = message
    if status == "StatusCode.INVALID_ARGUMENT":
        result.n_bad_refused += 1
    else:
        result.surprises.append(f"{request.kind}: {status} {message}")


def _plot(result: SoakResult, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seconds, n_bytes = np.asarray(result.memory).T
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.plot(seconds / 60, n_bytes / 1e6)
    axes.set(xlabel="minutes", ylabel="MB (proportional set size)", ylim=(0, n_bytes.max() / 1e6 * 1.15))
    axes.set_title(f"Server and its models: {result.n_requests:,} requests, {result.n_bad:,} of them bad")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    model: Annotated[Path, typer.Argument(metavar="REPOSITORY/NAME")],
    env: Annotated[Path | None, typer.Option(envvar="BABELTOWER_SERVER_ENV")] = None,
    n_requests: Annotated[int, typer.Option("--requests", min=40)] = 10_000,
    minutes: Annotated[float, typer.Option(min=0.1, help="The requests are spread over this time.")] = 10.5,
    record: Annotated[Path | None, typer.Option("--json")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the memory over time.")] = None,
) -> None:
    """Soak a server; exit code 0 if every answer was the right one and no process was restarted."""
    requests = _requests(model, n_requests)
    front = tuple(f"{model.name}_{modality}" for modality in ("text", "image"))
    manifest = Manifest.read(model)
    variant = manifest.variants[manifest.front_ends[0].variant]
    options = ServerOptions(models=(*front, variant.text.model, variant.image.model))
    with running_server(
        model.parent, environment=environment_from_folder(env or default_folder()), options=options
    ) as server:
        result = asyncio.run(_soak(server.addresses.grpc, requests, server.pid, minutes))
    restarted = result.processes_at_start != result.processes_at_end
    typer.echo(
        f"{result.n_good_right}/{result.n_good} good right (error ≤ {result.max_error:.1e}), "
        f"{result.n_bad_refused}/{result.n_bad} bad refused, {result.seconds / 60:.1f} min, "
        f"{result.growth_bytes_per_min / 1e6:+.2f} MB/min, restarted: {restarted}; {result.surprises[:5]}"
    )
    if record is not None:
        data = {
            "environment": asdict(environment()),
            "model": model.name,
            "growth_bytes_per_min": result.growth_bytes_per_min,
            **asdict(result),
        }
        record.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        _plot(result, plot)
    raise typer.Exit(int(restarted or bool(result.surprises) or result.n_good_right != result.n_good))


if __name__ == "__main__":
    typer.run(main)
