"""Separate Python environment of the server, which needs numpy below 2."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from runtime.errors import EngineError

__all__ = ["ServerEnvironment", "default_folder", "environment_from_folder"]

_REQUIREMENTS = "requirements.txt"
_READY = ".babeltower-requirements"
_SUPPORTED = ((3, 10), (3, 13))
"""Oldest and newest Python versions with stubs in the wheel and with pinned numpy wheels."""


@dataclass(frozen=True, slots=True)
class ServerEnvironment:
    """Python environment with ``tritonserver`` and the dependencies of its Python models."""

    folder: Path

    @property
    def python(self) -> Path:
        """Python interpreter of the environment."""
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """Folder of the environment's packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    @property
    def triton(self) -> Path:
        """Folder of the wheel's ``bin``, ``backends``, ``caches`` and stubs."""
        return self.site_packages / "pytriton" / "tritonserver"


def default_folder() -> Path:
    """Return the default environment folder of ``babeltower serve``, one per version of the requirements."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "babeltower" / f"server-{_digest()[:12]}"


def environment_from_folder(folder: Path) -> ServerEnvironment:
    """Return the environment in ``folder``, creating it if missing; safe across processes.

    Raises:
        EngineError: the Python version or platform is unsupported, pip failed, or the folder holds something
            else.
    """
    folder = folder.resolve()
    environment = ServerEnvironment(folder)
    if _is_ready(folder):
        return environment
    found = sys.version_info[:2]
    if not _SUPPORTED[0] <= found <= _SUPPORTED[1] or not sys.platform.startswith("linux"):
        raise EngineError(
            f"Triton's wheel is for Linux and Python 3.10 to 3.13; this is {sys.platform} and Python "
            f"{found[0]}.{found[1]}. Use another Python, or `babeltower serve --target gpu --write FOLDER`."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if not _is_ready(folder):
                _make(environment)
    except OSError as error:
        raise EngineError(
            f"The server's environment in {folder} cannot be created: {error}. "
            "Choose another folder with --env."
        ) from error
    return environment


def _make(environment: ServerEnvironment) -> None:
    folder = environment.folder
    if folder.exists():
        if not folder.is_dir():
            raise EngineError(f"{folder} is not a folder. Pass an empty or new folder for the environment.")
        if any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
            raise EngineError(f"{folder} is not a Python environment. Pass an empty or new folder.")
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / _REQUIREMENTS
        requirements.write_text(_requirements(), encoding="utf-8")
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(environment.python), "-m", "pip", "install", "--quiet", "-r", str(requirements)])
    (folder / _READY).write_text(_digest(), encoding="utf-8")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        tail = "\n".join(said.splitlines()[-5:]) or "it printed nothing; was it stopped, or memory short?"
        raise EngineError(
            f"Creating the server's environment failed: {' '.join(command)} ended with code "
            f"{done.returncode}:\n{tail}"
        )


def _is_ready(folder: Path) -> bool:
    ready = folder / _READY
    return ready.is_file() and ready.read_text(encoding="utf-8") == _digest()


def _requirements() -> str:
    return files("runtime.server").joinpath(_REQUIREMENTS).read_text(encoding="utf-8")


def _digest() -> str:
    return hashlib.sha256(f"{sys.version_info[:2]}\n{_requirements()}".encode()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
