"""Prometheus itself: found on the PATH, or unpacked from Debian's package under build/."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sample_models import ROOT
from serving import wait_until

__all__ = ["Prometheus", "programs_of_prometheus", "running_prometheus"]

_PROGRAMS = ("prometheus", "promtool")
_UNPACKED = ROOT / "build" / "prometheus"


def programs_of_prometheus() -> Path:
    """Folder of ``prometheus`` and ``promtool``; where they cannot be had, the test is skipped."""
    found = shutil.which(_PROGRAMS[0])
    if found and shutil.which(_PROGRAMS[1]):
        return Path(found).parent
    if not _UNPACKED.is_dir():
        _unpack()
    return _UNPACKED / "usr" / "bin"


def _unpack() -> None:
    """Download and unpack Debian's package; no root is needed, and nothing is installed."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        pytest.skip("needs prometheus and promtool on the PATH, or a Debian machine to get them on")
    _UNPACKED.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_UNPACKED.parent) as work:
        download = ["apt-get", "download", "prometheus"]
        commands = [download, ["apt-get", "update"], download]
        for command in commands:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            packages = list(Path(work).glob("prometheus_*.deb"))
            if packages:
                break
        else:
            pytest.skip(f"Debian's package prometheus cannot be downloaded: {done.stderr.strip()[-300:]}")
        unpacked = Path(work) / "unpacked"
        subprocess.run(["dpkg", "-x", str(packages[0]), str(unpacked)], check=True)
        unpacked.rename(_UNPACKED)


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that scrapes one server."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its interface."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=30) as client:
            answer = client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def result(self, expression: str) -> list[Any]:
        """Return the samples of an expression now."""
        found: list[Any] = self.ask("query", query=expression)["result"]
        return found


@contextlib.contextmanager
def running_prometheus(targets: dict[str, Any], rules: Path, folder: Path) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes every second.

    Args:
        targets: Scrape configurations by job.
        rules: File of rules, also evaluated every second.
    """
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": job, **options} for job, options in targets.items()],
    }
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                programs_of_prometheus() / "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'samples'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TZ": "UTC"},
        )
    prometheus = Prometheus(f"http://127.0.0.1:{port}")

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{prometheus.url}/-/ready", trust_env=False).status_code == 200
        return False

    try:
        wait_until(is_ready, "Prometheus is ready")
        yield prometheus
    finally:
        process.terminate()
        process.wait(60)
