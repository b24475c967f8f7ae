"""``babeltower serve`` in place of immich's service: its memory, first answers and queries, over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from runtime.errors import BabeltowerError

__all__ = ["ServiceFigures", "figures_of_service"]

_UNLOAD_AFTER_S = 3
_PATIENCE_S = 300.0
_LANGUAGE = "pt-BR"


@dataclass(frozen=True, slots=True)
class ServiceFigures:
    """Figures of one process, from its start until it has opened its text tower a second time.

    Attributes:
        idle_bytes: Resident memory before the first request.
        text_bytes: The same after a text.
        unloaded_bytes: The same once the tower was given back.
        first_wall_s: Seconds of the first text's answer, the tower's opening included; ``again`` after it was
            given back.
        query_cpu_ms: CPU milliseconds of a text's answer, HTTP included.
    """

    idle_bytes: int
    text_bytes: int
    unloaded_bytes: int
    first_wall_s: float
    first_cpu_s: float
    again_wall_s: float
    again_cpu_s: float
    query_wall_ms: tuple[float, ...]
    query_cpu_ms: tuple[float, ...]


def figures_of_service(repository: Path, model: str, *, queries: int) -> ServiceFigures:
    """Serve a repository, ask as immich's server does, and measure the process."""
    with _serving(repository) as service:
        idle = service.resident_bytes()
        first_wall_s, first_cpu_s = service.asked_text(model, "um gato preto")
        text = service.resident_bytes()
        wall, cpu = zip(*(service.asked_text(model, "um gato preto") for _ in range(queries)), strict=True)
        text = max(text, service.resident_bytes())
        unloaded = service.wait_until_unloaded(idle, text)
        again_wall_s, again_cpu_s = service.asked_text(model, "um gato preto")
    return ServiceFigures(
        idle_bytes=idle,
        text_bytes=text,
        unloaded_bytes=unloaded,
        first_wall_s=first_wall_s,
        first_cpu_s=first_cpu_s,
        again_wall_s=again_wall_s,
        again_cpu_s=again_cpu_s,
        query_wall_ms=tuple(1_000 * seconds for seconds in wall),
        query_cpu_ms=tuple(1_000 * seconds for seconds in cpu),
    )


@contextmanager
def _serving(repository: Path) -> Iterator[_Service]:
    command = [
        *(sys.executable, "-m", "babeltower", "serve", str(repository), "--http-api", "--in-process"),
        *("--port=0", f"--unload-after={_UNLOAD_AFTER_S}"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("http "):
                yield _Service(process.pid, urlsplit(line.split()[1]).netloc)
                return
        raise BabeltowerError(f"{' '.join(command)} ended with exit code {process.wait()}.")
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True, slots=True)
class _Service:
    """Process and address of a running service."""

    pid: int
    address: str

    def resident_bytes(self) -> int:
        """Return the resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def asked_text(self, model: str, text: str) -> tuple[float, float]:
        """Ask for a text's vector; return wall-clock and CPU seconds of the answer."""
        entry = {"modelName": model, "options": {"language": _LANGUAGE}}
        entries = json.dumps({"clip": {"textual": entry}})
        return self._asked({"entries": entries, "text": text})

    def wait_until_unloaded(self, idle: int, loaded: int) -> int:
        """Wait until most of what the tower took was given back, and no more is; return what is left.

        Raises:
            BabeltowerError: it is not.
        """
        give_up_at = time.monotonic() + _PATIENCE_S
        time.sleep(_UNLOAD_AFTER_S)
        least, seen = loaded, self.resident_bytes()
        while seen < least or seen > (idle + loaded) / 2:
            if time.monotonic() > give_up_at:
                raise BabeltowerError(
                    f"{seen} bytes are resident, of {loaded}: the tower was not given back."
                )
            least = min(least, seen)
            time.sleep(1)
            seen = self.resident_bytes()
        return seen

    def _asked(self, fields: dict[str, str]) -> tuple[float, float]:
        boundary = "immich-bench"
        head = f"--{boundary}\r\nContent-Disposition: form-data; name="
        parts = [f'{head}"{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()]
        body = f"{''.join(parts)}--{boundary}--\r\n".encode()
        connection = http.client.HTTPConnection(self.address, timeout=_PATIENCE_S)
        wall, cpu = time.perf_counter(), self._cpu_s()
        connection.request(
            "POST", "/predict", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )
        answer = connection.getresponse()
        page = answer.read()
        seconds = time.perf_counter() - wall, self._cpu_s() - cpu
        connection.close()
        if answer.status != 200:
            raise BabeltowerError(f"/predict answered {answer.status}: {page[:300].decode()}")
        return seconds

    def _cpu_s(self) -> float:
        """CPU seconds of the process, in steps of the scheduler's clock."""
        nanoseconds = sum(
            int((task / "schedstat").read_text().split()[0])
            for task in Path(f"/proc/{self.pid}/task").iterdir()
        )
        return nanoseconds / 1e9
