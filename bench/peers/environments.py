"""Environments of the peers, each with a name and versions pinned in ``requirements/NAME.txt``.

Environments are made on demand under ``build/peers``. torch is by far the largest of their packages: if the
suite's own environment has the pinned release, they use that copy (and nothing else of it) through a folder
of links; otherwise pip installs it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from runtime.errors import BabeltowerError

__all__ = ["ENVIRONMENTS", "FOLDER", "pins_of", "python_of"]

FOLDER = Path("build") / "peers"
_REQUIREMENTS = Path(__file__).resolve().parent / "requirements"

ENVIRONMENTS: tuple[str, ...] = tuple(sorted(path.stem for path in _REQUIREMENTS.glob("*.txt")))

_SHARED = ("torch", "torchvision")
_SHARED_WITH_THEM = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")
"""Packages that are installed with torch and needed by nothing else."""
_MARK = "requirements.sha256"


def pins_of(name: str) -> Mapping[str, str]:
    """Return the pinned version of each distribution.

    Raises:
        BabeltowerError: there is no environment of that name.
    """
    if name not in ENVIRONMENTS:
        raise BabeltowerError(f"No environment {name!r} for peers; there are {list(ENVIRONMENTS)}.")
    lines = (_REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8").split()
    return {line.partition("==")[0]: line.partition("==")[2] for line in lines}


def python_of(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """Return the interpreter of an environment, made if it is missing or its pins have changed.

    Args:
        folder: Folder of the environments.
        say: Called with a message if an environment has to be made, which takes a minute or more.

    Raises:
        BabeltowerError: there is no such environment, or pip failed; in that case nothing is left of it.
    """
    pins = pins_of(name)
    mark = hashlib.sha256(repr(sorted(pins.items())).encode()).hexdigest()
    place = folder.resolve() / name
    python = place / "bin" / "python"
    if python.is_file() and (place / _MARK).is_file() and (place / _MARK).read_text() == mark:
        return python
    say(f"making the environment {name}: {len(pins)} packages")
    shutil.rmtree(place, ignore_errors=True)
    try:
        _make(place, name, pins)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    (place / _MARK).write_text(mark)
    return python


def _make(place: Path, name: str, pins: Mapping[str, str]) -> None:
    venv.create(place, with_pip=True)
    if "torch" in pins and all(pins.get(package) in (None, _installed(package)) for package in _SHARED):
        links = _links_to_shared(place.parent / f"shared-torch-{pins['torch']}")
        (site,) = (place / "lib").glob("python*/site-packages")
        (site / "shared-torch.pth").write_text(f"{links}\n", encoding="utf-8")
    command = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    command += ["--disable-pip-version-check", "--requirement", str(_REQUIREMENTS / f"{name}.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BabeltowerError(
            f"pip could not make the environment {name!r}: {done.stderr.strip()[-600:]}\n"
            "Point BABELTOWER_PEERS at a folder that holds it, or name the peers that you want."
        )


def _links_to_shared(folder: Path) -> Path:
    """Make a folder of links to torch and its own packages, where pip cannot remove them."""
    folder.mkdir(parents=True, exist_ok=True)
    site = Path(sysconfig.get_paths()["purelib"])
    for distribution in metadata.distributions():
        name = str(distribution.metadata["Name"]).lower().replace("_", "-")
        if not _SHARED_WITH_THEM.fullmatch(name):
            continue
        for top in {file.parts[0] for file in distribution.files or ()} - {".."}:
            link = folder / top
            if not link.exists() and (site / top).exists():
                link.unlink(missing_ok=True)
                link.symlink_to(site / top)
    return folder


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Make all environments, or those named: ``python -m bench.peers.environments [NAME …]``."""
    folder = Path(os.environ.get("BABELTOWER_PEERS", FOLDER))
    for name in sys.argv[1:] or ENVIRONMENTS:
        print(python_of(name, folder, print), flush=True)


if __name__ == "__main__":
    main()
