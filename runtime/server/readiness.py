"""Readiness of a Triton server that tells the truth: each model embeds a probe text and a probe image.

It needs the standard library alone, since it also runs by itself in a container:

    python3 readiness.py /models http://127.0.0.1:8000

Exit code 0 if every model answers with PyTorch's vectors, else 1, with a line for each fault. A busy server
is ready: a probe that waits behind other requests passes if those are answered meanwhile; or, where the
server's processes can be seen, if those of the model compute, for ``MOST_BUSY_S`` at most.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import http.client
import json
import math
import os
import re
import signal
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "MOST_BUSY_S",
    "FrontEndProbe",
    "HttpEndpoint",
    "ProbeResult",
    "Stub",
    "UnixSocketHandler",
    "faults_of_processes",
    "faults_of_server",
    "main",
    "probes_of_repository",
    "results_of_probes",
    "stubs_of_server",
    "too_long_busy",
]

TIMEOUT_S = 3.0
"""Longest time for an answer to a probe while the model answers nothing else."""

MOST_BUSY_S = 300.0
"""Longest time that a model may compute without an answer before it counts as hung. A batch of 64 requests
whose images take the most that is allowed, 2 s of a core each, takes 130 s of a core of its own."""

_WORKING = 0.02
"""Cores that the processes of a working model use at least; those of an idle one use a twentieth of it."""

_WATCHED = "Babeltower-Health"
"""Header of a gateway's ``/v2/health/ready``: it tells what ``serve`` sees of the processes, as Triton's own
does not."""

_DEFAULT_MIN_COSINE = 0.8
_SLACK = 0.01
"""Allowed distance below the export's limit: readiness tells wrong vectors from right ones, no more."""

_UNAVAILABLE, _NO_METHOD = 503, 405
_STOPPED = "TtZX"
"""States of a process that does not run any more: stopped, traced, zombie, dead."""


_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    SyntaxError,
    EOFError,
    RecursionError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""Errors of reading a damaged manifest or probe file."""


@dataclass(frozen=True, slots=True)
class FrontEndProbe:
    """Probe of a front end: its inputs, and the vector that PyTorch computed for them."""

    model: str
    inputs: Mapping[str, bytes]
    vector: array[float]
    min_cosine: float


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, whose quoted path stands for the host."""

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(urllib.parse.unquote(self.host))


class UnixSocketHandler(urllib.request.AbstractHTTPHandler):
    """Opener of URLs ``unix://QUOTED_PATH/...``: HTTP over a Unix socket."""

    def unix_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Send a request."""
        return self.do_open(_UnixConnection, request)

    unix_request = urllib.request.AbstractHTTPHandler.do_request_


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Answers of redirection are failures: they would carry the token elsewhere."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""


class _OtherPortError(OSError):
    """What answers at an address is no server of babeltower's."""

    def __init__(self, endpoint: HttpEndpoint, found: str) -> None:
        super().__init__(
            f"{found}: {endpoint.url} is not babeltower's HTTP port. Pass the address that "
            "`babeltower serve` prints as http."
        )


@dataclass(frozen=True, slots=True)
class HttpEndpoint:
    """Address of a server's HTTP endpoint, and the headers of every request."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    context: ssl.SSLContext | None = None

    def answer(
        self,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> tuple[bytes, Mapping[str, str]]:
        """Return the body and headers of an answer; never through a proxy.

        Raises:
            HTTPError: the answer is one of failure.
            OSError: there is no answer, or one that is not HTTP.
        """
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/{path}", data=body, headers={**self.headers, **(headers or {})}
        )
        handlers: list[Any] = [urllib.request.ProxyHandler({}), UnixSocketHandler(), _NoRedirects()]
        if self.context is not None:
            handlers.append(urllib.request.HTTPSHandler(context=self.context))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
                return response.read(), dict(response.headers)
        except http.client.RemoteDisconnected:  # by a server that is stopped, too
            raise
        except (http.client.HTTPException, ValueError) as error:  # no HTTP, or an answer that ends early
            raise _OtherPortError(self, str(error) or type(error).__name__) from error


def probes_of_repository(repository: Path) -> list[FrontEndProbe]:
    """Return the probes of every model that has front ends: a short text and a small image each.

    Raises:
        ValueError: a manifest or probe file is missing or damaged.
    """
    found: list[FrontEndProbe] = []
    for path in sorted(repository.glob("*.babeltower.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            for served in manifest.get("front_ends", ()):
                limits = manifest["variants"][served["variant"]]["parity"].get("limits") or {}
                least = float(limits.get("min_cosine", _DEFAULT_MIN_COSINE)) - _SLACK
                found += _probes_of_model(repository / f"{manifest['name']}.probes.npz", served, least)
        except _UNREADABLE as error:
            raise ValueError(f"{path.name}: {type(error).__name__}: {error}") from error
    return found


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Result of a probe.

    Attributes:
        fault: What is wrong, in words; empty if the model is ready.
        is_busy: The model did not answer in time, but works.
        has_answered: It answered others meanwhile.
    """

    model: str
    fault: str = ""
    is_busy: bool = False
    has_answered: bool = True


def faults_of_server(
    endpoint: HttpEndpoint, probes: Sequence[FrontEndProbe], timeout_s: float = TIMEOUT_S
) -> list[str]:
    """Ask a server every probe at once; return what is wrong, in words: nothing if it is ready."""
    return [found.fault for found in results_of_probes(endpoint, probes, timeout_s) if found.fault]


def results_of_probes(
    endpoint: HttpEndpoint,
    probes: Sequence[FrontEndProbe],
    timeout_s: float = TIMEOUT_S,
    *,
    server: int | None = None,
) -> list[ProbeResult]:
    """Ask a server every probe at once; one result a probe, in order.

    Args:
        server: Process id of the server, if it runs here: a model whose processes compute is busy.
    """
    results = [ProbeResult(probe.model, f"{probe.model}: its probe has no result") for probe in probes]

    def ask(i: int) -> None:
        model = probes[i].model
        try:
            results[i] = _result_of_probe(endpoint, probes[i], timeout_s, server)
        except Exception as error:  # one that ends a thread would be seen by nobody
            results[i] = ProbeResult(model, f"{model}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(probes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def too_long_busy(results: Iterable[ProbeResult], busy_since: MutableMapping[str, float]) -> list[str]:
    """Return the faults of models that compute for ``MOST_BUSY_S`` without an answer.

    Args:
        results: Results of a round.
        busy_since: Time of ``time.monotonic`` since when each model computes without an answer; brought up
            to date.
    """
    faults = []
    for found in results:
        if not found.is_busy or found.has_answered:
            busy_since.pop(found.model, None)
        elif time.monotonic() - busy_since.setdefault(found.model, time.monotonic()) > MOST_BUSY_S:
            faults.append(f"{found.model}: it computes for {MOST_BUSY_S:.0f} s without an answer")
    return faults


@dataclass(frozen=True, slots=True)
class Stub:
    """Process of an instance of a Python model; ``region`` is its shared memory with the server."""

    pid: int
    instance: str
    region: str
    state: str


def stubs_of_server(server: int) -> list[Stub]:
    """Return the processes of a server's Python models, by its process id; a zombie has no name or region."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                state, parent, group = _state(int(folder.name))
                if server in (parent, group) and folder.name != str(server):
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    is_stub = words[0].endswith("triton_python_backend_stub")
                    named = (words[8], words[2]) if is_stub else ("", "")
                    if is_stub or state in _STOPPED:
                        found.append(Stub(int(folder.name), *named, state))
    return found


def faults_of_processes(server: int) -> list[str]:
    """Return the stopped or dead ones of a server and its Python models, in words."""
    try:
        state, *_ = _state(server)
    except (OSError, ValueError):
        return [f"the server, process {server}, is gone"]
    faults = []
    if state in _STOPPED:
        faults.append(f"the server, process {server}, is {'stopped' if state in 'Tt' else 'dead'}")
    for stub in stubs_of_server(server):
        if stub.state in _STOPPED:
            name = stub.instance or "a Python model"
            faults.append(f"{name}, process {stub.pid}, is {'stopped' if stub.state in 'Tt' else 'dead'}")
    return faults


def _state(pid: int) -> tuple[str, int, int]:
    """Return the state of a process, and the ids of its parent and group; its name may hold any character."""
    state, parent, group = (
        Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
    )
    return state, int(parent), int(group)


def _servers() -> Iterator[int]:
    """Process ids of all servers that this process sees, which in a container is one."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                if (folder / "comm").read_text().strip() == "tritonserver":
                    yield int(folder.name)


def _result_of_probe(
    endpoint: HttpEndpoint, probe: FrontEndProbe, timeout_s: float, server: int | None
) -> ProbeResult:
    model = probe.model
    began = time.monotonic()
    before = _n_answered(endpoint, model, timeout_s), _cpu_s(server, model)
    give_up_at = time.monotonic() + timeout_s
    may_be_busy = True
    try:
        vector = _vector(endpoint, probe, timeout_s)
    except urllib.error.HTTPError as error:
        reason = _reason(endpoint, error)
        if error.code != _UNAVAILABLE or "is stopping" in reason:
            return ProbeResult(model, f"{model}: {reason}")
        fault = reason  # its queue may be full
    except _OtherPortError as error:
        return ProbeResult(model, f"{model}: {error}")
    except OSError as error:
        fault = str(error) or type(error).__name__
        may_be_busy = isinstance(getattr(error, "reason", error), TimeoutError)
    except (ValueError, KeyError, TypeError, struct.error, RecursionError):
        return ProbeResult(model, f"{model}: {_OtherPortError(endpoint, 'the answer is not of a model')}")
    else:
        return ProbeResult(model, _fault_of_vector(probe, vector))
    # Looked at now: a server that was started again by the end of the wait is well once more.
    is_seen_well = may_be_busy and server is None and _is_watched_and_healthy(endpoint, timeout_s)
    while True:
        after = _n_answered(endpoint, model, timeout_s), _cpu_s(server, model)
        if _has_grown(before[0], after[0], 0):
            return ProbeResult(model, is_busy=True)
        if time.monotonic() >= give_up_at:
            break
        time.sleep(0.1)
    works = _has_grown(before[1], after[1], _WORKING * (time.monotonic() - began))
    if may_be_busy and (works or (is_seen_well and _is_watched_and_healthy(endpoint, timeout_s))):
        return ProbeResult(model, is_busy=True, has_answered=False)
    return ProbeResult(model, f"{model}: {fault}")


def _has_grown(before: float | None, after: float | None, least: float) -> bool:
    return before is not None and after is not None and after - before > least


def _is_watched_and_healthy(endpoint: HttpEndpoint, timeout_s: float) -> bool:
    """Ask ``serve``, which sees the processes of its server; Triton's own readiness says nothing."""
    with contextlib.suppress(OSError):
        _, headers = endpoint.answer("v2/health/ready", timeout_s=timeout_s)
        return _WATCHED.lower() in {name.lower() for name in headers}
    return False


def _cpu_s(server: int | None, model: str) -> float | None:
    """Processor time of the processes that compute a front end's answers, in seconds; ``None`` if unknown."""
    if server is None:
        return None
    stubs = [stub for stub in stubs_of_server(server) if stub.instance.startswith(f"{model}_")]
    own = re.compile(re.escape(model) + r"_\d+_\d+")
    pids = [stub.pid for stub in stubs]
    if all(own.fullmatch(stub.instance) for stub in stubs):
        pids.append(server)  # a backend without a process of its own computes the tower there
    try:
        return sum(_cpu_s_of_process(pid) for pid in pids)
    except (OSError, ValueError, IndexError):
        return None


def _cpu_s_of_process(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _reason(endpoint: HttpEndpoint, error: urllib.error.HTTPError) -> str:
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError, RecursionError, http.client.HTTPException
    ):
        reason = str(json.loads(error.read())["error"])
        if error.code != _NO_METHOD:  # as on the port of metrics
            return reason
    return str(_OtherPortError(endpoint, f"HTTP {error.code}"))


def _fault_of_vector(probe: FrontEndProbe, vector: array[float]) -> str:
    cosine = _cosine(vector, probe.vector)
    if not cosine >= probe.min_cosine:
        least = f"{probe.min_cosine:.4f}"
        return f"{probe.model}: its vector has cosine {cosine:.4f} with PyTorch's; expected {least}"
    return ""


def _n_answered(endpoint: HttpEndpoint, model: str, timeout_s: float) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        body, _ = endpoint.answer(f"v2/models/{model}/stats", timeout_s=timeout_s / 3)
        stats = json.loads(body)["model_stats"]
        return sum(int(one["inference_stats"]["success"]["count"]) for one in stats)
    return None


def _vector(endpoint: HttpEndpoint, probe: FrontEndProbe, timeout_s: float) -> array[float]:
    """Return the vector of a probe: KServe v2 over HTTP, tensors in binary."""
    contents = {name: struct.pack("<I", len(value)) + value for name, value in probe.inputs.items()}
    inputs = [
        {
            "name": name,
            "shape": [1, 1],
            "datatype": "BYTES",
            "parameters": {"binary_data_size": len(content)},
        }
        for name, content in contents.items()
    ]
    outputs = [{"name": "vector", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    body, headers = endpoint.answer(
        f"v2/models/{probe.model}/infer",
        b"".join([head, *contents.values()]),
        {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"},
        timeout_s,
    )
    n_head = int({name.lower(): value for name, value in headers.items()}["inference-header-content-length"])
    return _floats(body[n_head:])


def _cosine(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the cosine of two vectors; NaN if a vector is zero or not finite, or of another width."""
    if len(found) != len(expected):
        return math.nan
    scale = math.sqrt(sum(x * x for x in found)) * math.sqrt(sum(y * y for y in expected))
    return sum(x * y for x, y in zip(found, expected, strict=True)) / scale if scale else math.nan


def _probes_of_model(path: Path, served: Mapping[str, str], least: float) -> Iterator[FrontEndProbe]:
    with zipfile.ZipFile(path) as file:

        def read(name: str) -> tuple[str, tuple[int, ...], bytes]:
            return _npy(file.read(f"{name}.npy"))

        texts, images = (_items(read(name)[2], read(f"{name}_lengths")[2]) for name in ("texts", "images"))
        descr, _, data = read("languages")
        size = 4 * int(descr.lstrip("<U"))
        languages = [
            data[i : i + size].decode("utf-32-le").rstrip("\0") for i in range(0, len(data), size or 1)
        ]
        visible = [i for i, text in enumerate(texts) if text.decode().strip()]
        if visible:
            i = min(visible, key=lambda i: len(texts[i]))
            inputs = {"text": texts[i], "language": languages[i].encode()}
            yield FrontEndProbe(served["text"], inputs, _row(read("text_vectors"), i), least)
        if images:
            i = min(range(len(images)), key=lambda i: len(images[i]))
            yield FrontEndProbe(served["image"], {"image": images[i]}, _row(read("image_vectors"), i), least)


def _npy(content: bytes) -> tuple[str, tuple[int, ...], bytes]:
    """Return type, shape and data of NumPy's file format."""
    if content[:6] != b"\x93NUMPY":
        raise ValueError("a probe file is not NumPy's")
    wide = content[6] > 1
    (n_head,) = struct.unpack_from("<I" if wide else "<H", content, 8)
    start = (12 if wide else 10) + n_head
    head = ast.literal_eval(content[start - n_head : start].decode("latin-1"))
    return head["descr"], head["shape"], content[start:]


def _items(data: bytes, lengths: bytes) -> list[bytes]:
    found, start = [], 0
    for (length,) in struct.iter_unpack("<q", lengths):
        found.append(data[start : start + length])
        start += length
    return found


def _row(tensor: tuple[str, tuple[int, ...], bytes], i: int) -> array[float]:
    descr, shape, data = tensor
    if descr != "<f4":
        raise ValueError(f"probe vectors are {descr}; expected <f4")
    width = shape[1] * 4
    return _floats(data[i * width : (i + 1) * width])


def _floats(data: bytes) -> array[float]:
    found = array("f")
    found.frombytes(data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a server; print its faults, and return the exit code."""
    parser = argparse.ArgumentParser(description="Check that every model of a server embeds its probes.")
    parser.add_argument("repository", type=Path)
    parser.add_argument("url")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for an answer")
    parser.add_argument("--processes", action="store_true", help="check the server's processes here too")
    parser.add_argument(
        "--restart-after", type=int, default=0, metavar="N", help="kill the server here after N failed checks"
    )
    given = parser.parse_args(arguments)
    token = os.environ.get("BABELTOWER_TOKEN")
    endpoint = HttpEndpoint(given.url, {"Authorization": f"Bearer {token}"} if token else {})
    faults, servers = [], list(_servers()) if given.processes else []
    if given.processes:
        faults += [fault for pid in servers for fault in faults_of_processes(pid)]
        faults += [] if servers else ["no server runs here"]
    try:
        probes = probes_of_repository(given.repository)
        server = servers[0] if len(servers) == 1 else None
        results = results_of_probes(endpoint, probes, given.timeout, server=server)
        faults += [found.fault for found in results if found.fault]
        faults += _too_long_busy_of_checks(results)
    except ValueError as error:
        faults.append(f"the probes of {given.repository} cannot be read: {error}")
    for fault in faults:
        print(fault, file=sys.stderr)
    if given.restart_after and _failed_checks(bool(faults)) >= given.restart_after:
        _failed_checks(False)
        for pid in _servers():
            os.kill(pid, signal.SIGKILL)  # one that is stopped does not hear anything else
    return 1 if faults else 0


def _failed_checks(has_failed: bool) -> int:
    """Count the checks that failed in a row, in a file."""
    path = Path(tempfile.gettempdir()) / "babeltower-failed-checks"
    n_failed = 0
    if has_failed:
        with contextlib.suppress(OSError, ValueError):
            n_failed = int(path.read_text())
        n_failed += 1
    path.write_text(str(n_failed))
    return n_failed


def _too_long_busy_of_checks(results: Sequence[ProbeResult]) -> list[str]:
    """Return the faults of models that were busy in every check for too long; checks share a file."""
    path = Path(tempfile.gettempdir()) / "babeltower-busy-since"
    since: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        since = {str(model): float(at) for model, at in json.loads(path.read_text()).items()}
    faults = too_long_busy(results, since)
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(since))
    return faults


if __name__ == "__main__":
    sys.exit(main())
