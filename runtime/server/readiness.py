"""Readiness of a Triton server that tells the truth: each model embeds a probe text and a probe image.

It needs the standard library alone, since it also runs by itself in a container:

    python3 readiness.py /models http://127.0.0.1:8000

Exit code 0 if every model answers with PyTorch's vectors, else 1, with a line for each fault. A busy server
is ready: a probe that waits behind other requests passes if those are answered meanwhile.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import http.client
import json
import math
import os
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
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "FrontEndProbe",
    "HttpEndpoint",
    "Stub",
    "UnixSocketHandler",
    "faults_of_processes",
    "faults_of_server",
    "main",
    "probes_of_repository",
    "stubs_of_server",
]

TIMEOUT_S = 3.0
"""Longest time for an answer to a probe while the model answers nothing else."""

_DEFAULT_MIN_COSINE = 0.8
_SLACK = 0.01
"""Allowed distance below the export's limit: readiness tells wrong vectors from right ones, no more."""

_UNAVAILABLE = 503
_STOPPED = "TtZX"
"""States of a process that does not run any more: stopped, traced, zombie, dead."""


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
            OSError: there is no answer, or one of failure.
        """
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/{path}", data=body, headers={**self.headers, **(headers or {})}
        )
        handlers: list[Any] = [urllib.request.ProxyHandler({}), UnixSocketHandler()]
        if self.context is not None:
            handlers.append(urllib.request.HTTPSHandler(context=self.context))
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
            return response.read(), dict(response.headers)


def probes_of_repository(repository: Path) -> list[FrontEndProbe]:
    """Return the probes of every model that has front ends: a short text and a small image each.

    Raises:
        OSError, ValueError, KeyError: a manifest or probe file is missing or damaged.
    """
    found: list[FrontEndProbe] = []
    for path in sorted(repository.glob("*.babeltower.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for served in manifest.get("front_ends", ()):
            limits = manifest["variants"][served["variant"]]["parity"].get("limits") or {}
            least = float(limits.get("min_cosine", _DEFAULT_MIN_COSINE)) - _SLACK
            found += _probes_of_model(repository / f"{manifest['name']}.probes.npz", served, least)
    return found


def faults_of_server(
    endpoint: HttpEndpoint, probes: Sequence[FrontEndProbe], timeout_s: float = TIMEOUT_S
) -> list[str]:
    """Ask a server every probe at once; return what is wrong, in words: nothing if it is ready."""
    faults: dict[int, str] = {}

    def ask(i: int) -> None:
        fault = _fault_of_probe(endpoint, probes[i], timeout_s)
        if fault is not None:
            faults[i] = fault

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(probes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [faults[i] for i in sorted(faults)]


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


def _fault_of_probe(endpoint: HttpEndpoint, probe: FrontEndProbe, timeout_s: float) -> str | None:
    before = _n_answered(endpoint, probe.model, timeout_s)
    give_up_at = time.monotonic() + timeout_s
    try:
        vector = _vector(endpoint, probe, timeout_s)
    except urllib.error.HTTPError as error:
        reason = _reason(error)
        if error.code != _UNAVAILABLE or "is stopping" in reason:
            return f"{probe.model}: {reason}"
        fault = reason  # its queue may be full
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        fault = str(error) or type(error).__name__
    else:
        return _fault_of_vector(probe, vector)
    while True:
        after = _n_answered(endpoint, probe.model, timeout_s)
        if before is not None and after is not None and after > before:
            return None  # busy
        if time.monotonic() >= give_up_at:
            return f"{probe.model}: {fault}"
        time.sleep(0.1)


def _reason(error: urllib.error.HTTPError) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(error.read())["error"])
    return f"HTTP {error.code}"


def _fault_of_vector(probe: FrontEndProbe, vector: array[float]) -> str | None:
    cosine = _cosine(vector, probe.vector)
    if not cosine >= probe.min_cosine:
        least = f"{probe.min_cosine:.4f}"
        return f"{probe.model}: its vector has cosine {cosine:.4f} with PyTorch's; expected {least}"
    return None


def _n_answered(endpoint: HttpEndpoint, model: str, timeout_s: float) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
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
    faults = []
    if given.processes:
        servers = list(_servers())
        faults += [fault for pid in servers for fault in faults_of_processes(pid)]
        faults += [] if servers else ["no server runs here"]
    try:
        faults += faults_of_server(endpoint, probes_of_repository(given.repository), given.timeout)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
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


if __name__ == "__main__":
    sys.exit(main())
