"""Measure what the gateway costs: rate and CPU time of a text over gRPC and through the gateway, in turns.

    python -m bench.serving.gateway_cost REPOSITORY/NAME --json bench/results/gateway_cost.json

Two `babeltower serve` run beside each other: one without a token, whose gRPC is Triton's own, and one with a
token, whose gRPC is guarded too. Clients that each send one text and wait take turns with every way. The CPU
time of Triton, of the gateway and of the client are told apart, since they share the machine's cores here,
but not where the client is another machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import typer

from bench.records.turns import write_turns
from bench.serving.gateway_soak import asked_by_clients, body_of_request
from bench.timing.serve_process import ServeProcess
from bench.timing.soak_requests import Request, requests_of_soak
from runtime.manifest import Manifest
from runtime.server import default_folder, environment_from_folder

__all__ = ["CostTurn", "GatewayCost", "cpu_s_of_processes"]

_KIND = "babeltower-gateway-cost/1"
_TOKEN = "0123456789abcdef-of-the-benchmark"
_PORTS = ("--port=0", "--grpc-port=0", "--metrics-port=0", "--http-api")
GRPC = "grpc"
"""Way of the comparison: Triton's own gRPC."""


@dataclass(frozen=True, slots=True)
class CostTurn:
    """Texts that a way answered in a turn, and the CPU ms of each: Triton's, the gateway's, the client's."""

    n_texts: int
    seconds: float
    triton_ms: float
    gateway_ms: float
    client_ms: float

    @property
    def rate(self) -> float:
        """Texts per second, on cores that the client shares."""
        return self.n_texts / self.seconds

    @property
    def served_ms(self) -> float:
        """CPU time of the server's machine for a text, in ms."""
        return self.triton_ms + self.gateway_ms


@dataclass(slots=True)
class GatewayCost:
    """Turns of every way, in order."""

    turns: dict[str, list[CostTurn]] = field(default_factory=dict)

    def rate_share(self, way: str) -> float:
        """Median over rounds of rate ÷ gRPC's rate, client included."""
        return self._share(way, lambda turn: turn.rate)

    def cpu_share(self, way: str) -> float:
        """Median over rounds of gRPC's CPU time on the server's machine ÷ this way's: the share of its rate
        that is left where the clients are elsewhere."""
        return self._share(way, lambda turn: 1 / turn.served_ms)

    def _share(self, way: str, of: Callable[[CostTurn], float]) -> float:
        pairs = zip(self.turns[way], self.turns[GRPC], strict=True)
        return statistics.median(of(turn) / of(raw) for turn, raw in pairs)

    def __str__(self) -> str:
        lines = []
        for way, turns in self.turns.items():
            triton, gateway, client, rate = (
                statistics.median(getattr(turn, name) for turn in turns)
                for name in ("triton_ms", "gateway_ms", "client_ms", "rate")
            )
            lines.append(
                f"{way}: {rate:.0f} texts/s ({self.rate_share(way):.0%} of gRPC's); CPU ms a text: Triton "
                f"{triton:.2f}, gateway {gateway:.2f}, client {client:.2f} ({self.cpu_share(way):.0%})"
            )
        return "\n".join(lines)


def cpu_s_of_processes(pids: Sequence[int]) -> float:
    """Return the CPU time of running processes in seconds, in steps of 10 ms."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks += int(after_name[11]) + int(after_name[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _processes_of_group(leader: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(folder.name)) == leader:
                found.append(int(folder.name))
    return found


@dataclass(frozen=True, slots=True)
class _Way:
    """Way to ask: the server that is asked, what is sent, and how."""

    serving: ServeProcess
    given: Sequence[Any]
    ask: Callable[[Any], Awaitable[None]]


async def _turn(way: _Way, n_clients: int, turn_s: float) -> CostTurn:
    triton = _processes_of_group(way.serving.server_pid)
    gateway = [way.serving.process.pid]
    end = time.perf_counter() + turn_s
    n_texts = 0

    def until_end() -> Iterator[Any]:
        nonlocal n_texts
        for one in cycle(way.given):
            if time.perf_counter() > end:
                return
            n_texts += 1
            yield one

    def spent() -> tuple[float, float, float]:
        return cpu_s_of_processes(triton), cpu_s_of_processes(gateway), time.process_time()

    before, started = spent(), time.perf_counter()
    await asked_by_clients(n_clients, until_end(), way.ask)
    seconds = time.perf_counter() - started
    triton_ms, gateway_ms, client_ms = (
        round((now - then) / n_texts * 1e3, 4) for now, then in zip(spent(), before, strict=True)
    )
    return CostTurn(n_texts, round(seconds, 3), triton_ms, gateway_ms, client_ms)


async def _measured(
    open_: ServeProcess,
    closed: ServeProcess,
    name: str,
    requests: Sequence[Request],
    *,
    n_clients: int,
    rounds: int,
    turn_s: float,
) -> GatewayCost:
    import aiohttp
    from tritonclient.grpc import InferInput
    from tritonclient.grpc.aio import InferenceServerClient

    packed = [body_of_request(name, request) for request in requests]
    listed = [json.dumps({**json.loads(body), "encoding_format": "float"}).encode() for body in packed]
    tensors = []
    for request in requests:
        given = []
        for column, array in request.inputs.items():
            given.append(InferInput(column, list(array.shape), "BYTES"))
            given[-1].set_data_from_numpy(array)
        tensors.append(given)
    raw, guarded = (serving.address("grpc").removeprefix("grpc://") for serving in (open_, closed))
    url, headers = open_.address("http"), {"authorization": f"Bearer {_TOKEN}"}
    async with (
        aiohttp.ClientSession(trust_env=False) as session,
        InferenceServerClient(raw) as client,
        InferenceServerClient(guarded) as guarded_client,
    ):

        async def through_gateway(body: bytes) -> None:
            async with session.post(f"{url}/v1/embeddings", data=body) as answer:
                answer.raise_for_status()
                await answer.read()

        async def over_grpc(given: Any) -> None:
            (await client.infer(f"{name}_text", given)).as_numpy("vector")

        async def over_guarded_grpc(given: Any) -> None:
            (await guarded_client.infer(f"{name}_text", given, headers=headers)).as_numpy("vector")

        ways = {
            GRPC: _Way(open_, tensors, over_grpc),
            "/v1, base64": _Way(open_, packed, through_gateway),
            "/v1, float": _Way(open_, listed, through_gateway),
            "grpc, guarded": _Way(closed, tensors, over_guarded_grpc),
        }
        for way in ways.values():
            await _turn(way, n_clients, turn_s)  # warms up
        found = GatewayCost({name: [] for name in ways})
        for i in range(rounds):
            order = list(ways) if i % 2 == 0 else list(reversed(ways))
            for label in order:
                found.turns[label].append(await _turn(ways[label], n_clients, turn_s))
        return found


def main(
    model: Annotated[Path, typer.Argument(metavar="REPOSITORY/NAME")],
    env: Annotated[Path | None, typer.Option(envvar="BABELTOWER_SERVER_ENV")] = None,
    clients: Annotated[int, typer.Option(min=1)] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 12,
    turn_s: Annotated[float, typer.Option(min=0.1)] = 4.0,
    record: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Compare rates and CPU time of a text over gRPC and through the gateway."""
    requests = [request for request in requests_of_soak(model, 2_000) if request.kind == "text"]
    environment_ = environment_from_folder(env or default_folder())
    with (
        tempfile.TemporaryDirectory() as folder,
        ServeProcess(model.parent, environment_, *_PORTS) as open_,
    ):
        token = Path(folder) / "token"
        token.write_text(_TOKEN)
        with ServeProcess(model.parent, environment_, *_PORTS, "--token-file", str(token)) as closed:
            open_.wait_until_served()
            closed.wait_until_served()
            found = asyncio.run(
                _measured(
                    open_, closed, model.name, requests, n_clients=clients, rounds=rounds, turn_s=turn_s
                )
            )
    typer.echo(str(found))
    if record is not None:
        variant = Manifest.read(model).front_ends[0].variant
        facts = {
            "model": model.name,
            "variant": variant,
            "clients": clients,
            "rate_share": {way: round(found.rate_share(way), 4) for way in found.turns},
            "cpu_share": {way: round(found.cpu_share(way), 4) for way in found.turns},
        }
        write_turns(record, _KIND, facts, found.turns)


if __name__ == "__main__":
    typer.run(main)
