"""Soak-test the HTTP gateway with thousands of requests, some invalid.

    python -m bench.serving.gateway_soak REPOSITORY/NAME --requests 10000 --clients 16 --json FILE

The requests are those of ``bench.serving.server_soak``, sent to ``POST /v1/embeddings`` by clients that each
wait for one answer: every twentieth is invalid in one of fifteen ways and must be answered 400, all others
with the vector of the in-process runtime.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the source tree, not from bench/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import typer

from bench.records.environment import environment
from bench.timing.soak_requests import BAD_EVERY, Request, requests_of_soak
from runtime.commands.doors import Door, guarded_server, local_models, running_door
from runtime.gateway.models import local_opener
from runtime.gateway.options import GatewayOptions
from runtime.server import ServerOptions, default_folder, environment_from_folder, running_server
from runtime.server.security import Security

__all__ = ["GatewaySoak", "asked_by_clients", "body_of_request"]

_KIND = "babeltower-gateway-soak/1"
_TOLERANCE = 1e-6
_HOST = "127.0.0.1"


@dataclass(slots=True)
class GatewaySoak:
    """Results of a soak test of the gateway.

    Attributes:
        kinds: Number of invalid requests that were refused, by kind.
        surprises: Unexpected answers.
    """

    n_requests: int = 0
    n_good_right: int = 0
    n_bad_refused: int = 0
    max_error: float = 0.0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    surprises: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """True if every request was answered as it should be."""
        return not self.surprises and self.n_good_right + self.n_bad_refused == self.n_requests

    def note(self, request: Request, status: int, answer: bytes) -> None:
        """Compare an answer with the expected one."""
        self.n_requests += 1
        if request.expected is None and status in (400, 413) and json.loads(answer)["error"]["message"]:
            self.n_bad_refused += 1
            self.kinds[request.kind] = self.kinds.get(request.kind, 0) + 1
        elif request.expected is not None and status == 200:
            packed = json.loads(answer)["data"][0]["embedding"]
            vector = np.frombuffer(base64.b64decode(packed), "<f4")
            error = float(np.abs(vector - request.expected).max())
            self.max_error = max(self.max_error, error)
            if error <= _TOLERANCE:
                self.n_good_right += 1
            else:
                self.surprises.append(f"{request.kind}: its vector differs by {error:.1e}")
        else:
            self.surprises.append(f"{request.kind}: HTTP {status} {answer[:200].decode(errors='replace')}")


def body_of_request(name: str, request: Request) -> bytes:
    """Return the body that asks the gateway what a request asks Triton, its fault included."""
    body: dict[str, Any] = {"model": name, "encoding_format": "base64"}
    raw = b""
    for column, array in request.inputs.items():
        value = array.ravel()[0]
        if array.dtype == np.int32:
            body |= {"dimensions": int(value)} if column == "dim" else {"input": [int(value)]}
        elif column == "image":
            body["input"] = [{"image": base64.b64encode(value).decode()}]
        elif column == "text" and array.ndim == 1:
            body["input"] = [[value.decode()]]
        elif _is_utf8(value):
            body[{"text": "input"}.get(column, column)] = [value.decode()]
        else:
            raw += b',"%s":["%s"]' % ({"text": b"input"}.get(column, column.encode()), value)
    return json.dumps(body).encode()[:-1] + raw + b"}"


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


async def asked_by_clients(
    n_clients: int, given: Iterator[Any], ask: Callable[[Any], Awaitable[None]]
) -> None:
    """Let clients take what is given in turns, each waiting for its answer."""

    async def client() -> None:
        for one in given:
            await ask(one)

    await asyncio.gather(*(client() for _ in range(n_clients)))


async def _soak(url: str, name: str, requests: Sequence[Request], n_clients: int) -> GatewaySoak:
    import aiohttp

    result = GatewaySoak()
    async with aiohttp.ClientSession(trust_env=False) as session:

        async def ask(request: Request) -> None:
            async with session.post(f"{url}/v1/embeddings", data=body_of_request(name, request)) as answer:
                result.note(request, answer.status, await answer.read())

        started = time.perf_counter()
        await asked_by_clients(n_clients, iter(requests), ask)
        result.seconds = time.perf_counter() - started
    return result


def main(
    model: Annotated[Path, typer.Argument(metavar="REPOSITORY/NAME")],
    env: Annotated[Path | None, typer.Option(envvar="BABELTOWER_SERVER_ENV")] = None,
    n_requests: Annotated[int, typer.Option("--requests", min=BAD_EVERY)] = 10_000,
    clients: Annotated[int, typer.Option(min=1)] = 16,
    in_process: Annotated[bool, typer.Option("--in-process", help="Without Triton.")] = False,
    record: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Soak-test the gateway; exit code 0 if every request is answered as it should be."""
    requests = requests_of_soak(model, n_requests)
    door = Door(_HOST, 0, GatewayOptions())
    with contextlib.ExitStack() as stack:
        if in_process:
            models = [stack.enter_context(found) for found in local_models(model.parent, None)]
            url = stack.enter_context(running_door(door, [local_opener(found) for found in models]))
            result = asyncio.run(_soak(url, model.name, requests, clients))
        else:
            options = ServerOptions(security=Security(guarded=True))
            server = stack.enter_context(
                running_server(
                    model.parent,
                    environment=environment_from_folder(env or default_folder()),
                    options=options,
                )
            )
            url = stack.enter_context(guarded_server(door, server, [model.name], http_api=True)).http_url
            result = asyncio.run(_soak(url, model.name, requests, clients))
    typer.echo(
        f"{result.n_good_right} good right (error ≤ {result.max_error:.1e}), {result.n_bad_refused} bad "
        f"refused of {result.n_requests} in {result.seconds:.0f} s; {len(result.surprises)} surprises"
    )
    for surprise in result.surprises[:5]:
        typer.echo(surprise, err=True)
    if record is not None:
        data = {
            "schema": _KIND,
            "environment": asdict(environment()),
            "model": model.name,
            "clients": clients,
            "in_process": in_process,
            **asdict(result),
        }
        record.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    raise typer.Exit(int(not result.is_right))


if __name__ == "__main__":
    typer.run(main)
