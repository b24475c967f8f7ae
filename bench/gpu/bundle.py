"""Build the bundle: sources, ONNX Runtime cut to one GPU, exported samples, graphs without weights."""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from bench.gpu.parts.device_code import cut_library
from bench.gpu.parts.packing import pack_folder
from bench.gpu.samples import sample_repository
from bench.gpu.skeletons import require_activation, skeleton_from_graph
from bench.gpu.stamps import ExportStamp
from bench.gpu.towers import DRY_TOWERS, TOWERS, TimedTower
from bench.models.full_size import in_process
from bench.models.samples import ROOT, SAMPLES
from bench.models.speed_artefacts import fp32_graph
from bench.records.environment import environment
from export.precision.calibration import samples_folder
from runtime.errors import BabeltowerError
from runtime.manifest import Manifest
from runtime.storage import staged_folder

__all__ = ["BUNDLE_FACTS", "MOST_BYTES", "build_bundle", "parts_of", "require_replaceable", "require_small"]

BUNDLE_FACTS = "bundle.json"
"""File of a bundle that names its commit, compute capability and samples."""

MOST_BYTES = 64 << 20
"""Maximum size of a bundle, in bytes."""

_WHEEL, _TOOL = "onnxruntime-gpu", "nvidia-cuda-cuobjdump"
_PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_PROVIDER = "libonnxruntime_providers_cuda.so"
_SOURCES = ("runtime", "export", "bench", "triton_models", "babeltower.py")
_NOT_CARRIED = ("bench/results/",)
_PACKAGES, _PURE = ("ftfy", "wcwidth"), (".py", ".json", ".txt")
_RUN = """#!/bin/sh
# Measure this machine's GPU: sh run.sh OUT [--minutes N] [--only STEP,...] [--dry]
set -e
here=$(cd "$(dirname "$0")" && pwd)
work=${BABELTOWER_GPU_WORK:-/tmp/gpu-run}
out=$1
shift
mkdir -p "$work"
work=$(cd "$work" && pwd)
python=${PYTHON:-python3}
"$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \\
    "$here/source.tar.xz" "$work/source"
export PYTHONPATH="$work/source" PYTHONUNBUFFERED=1
exec "$python" -m bench.gpu run "$here" "$out" --work "$work" "$@"
"""


def build_bundle(
    out: Path,
    *,
    wheel: Path | None,
    work: Path,
    architecture: int,
    samples: Sequence[str] = SAMPLES,
    say: Callable[[str], None] = print,
) -> int:
    """Build a bundle in ``out`` and return its size in bytes; slow parts are kept in ``work``.

    Raises:
        BabeltowerError: a part cannot be made, or the bundle is too large.
    """
    work.mkdir(parents=True, exist_ok=True)
    with staged_folder(out) as folder:
        say("sources")
        _pack_sources(folder / "source.tar.xz")
        say("samples")
        pack_folder(sample_repository(work / "repository", samples), folder / "samples.pack")
        _pack_emoji(folder / "emoji.tar")
        _pack_packages(folder / "packages.tar.xz")
        say("full-size graphs")
        _pack_files(skeletons(TOWERS, work), folder / "skeletons.tar.xz")
        say(f"ONNX Runtime for compute capability {architecture / 10}")
        for part in cut_onnxruntime(wheel or _downloaded(_WHEEL, work), work, architecture):
            shutil.copy(part, folder / part.name)
        facts = {"commit": environment().commit, "architecture": architecture, "samples": list(samples)}
        (folder / BUNDLE_FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (folder / "run.sh").write_text(_RUN, encoding="utf-8")
        total = require_small(folder)
        for size, name in parts_of(folder):
            say(f"{size / 2**20:8.2f} MiB  {name}")
    say(f"{total / 2**20:8.2f} MiB  {out} in all, of {MOST_BYTES >> 20}")
    return total


def require_replaceable(out: Path) -> None:
    """Check, before anything is built, that ``out`` is free or an earlier bundle.

    Raises:
        BabeltowerError: it is a file, or a folder of something else.
    """
    if out.is_dir() and ((out / BUNDLE_FACTS).is_file() or not any(out.iterdir())):
        return
    if out.exists() or out.is_symlink():
        raise BabeltowerError(
            f"{out} is not a bundle, so it is not replaced. Pass another --out, or remove it."
        )


def parts_of(folder: Path) -> list[tuple[int, str]]:
    """Return the bundle's files as (bytes, name), largest first."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        ((path.stat().st_size, path.relative_to(folder).as_posix()) for path in files), reverse=True
    )


def require_small(folder: Path, most: int = MOST_BYTES) -> int:
    """Return the size of a bundle in bytes.

    Raises:
        BabeltowerError: it is too large; the message lists the largest parts.
    """
    parts = parts_of(folder)
    total = sum(size for size, _ in parts)
    if total > most:
        largest = ", ".join(f"{name} {size / 2**20:.1f}" for size, name in parts[:5])
        raise BabeltowerError(
            f"The bundle has {total / 2**20:.1f} MiB; at most {most / 2**20:.0f} can be carried. The "
            f"largest, in MiB: {largest}. Leave out samples (--sample)."
        )
    return total


def skeletons(towers: Iterable[TimedTower], work: Path) -> list[Path]:
    """Return the files of the towers' graphs without weights, and of the samples' for dry runs.

    Kept are those of the same sources, which also make the checkpoints' random weights.
    """
    found = []
    made: set[Path] = set()
    for tower in towers:
        target = work / "skeletons" / f"{tower.slug}.onnx"
        stamp = ExportStamp.of(target.with_suffix(".sha256"), Path(__file__).with_name("skeletons.py"))
        if not stamp.is_current:
            stamp.file.unlink(missing_ok=True)
            checkpoint = work / "checkpoints" / tower.variant
            for folder in {work / f"{tower.variant}_{tower.modality.value}", checkpoint} - made:
                shutil.rmtree(folder, ignore_errors=True)
            made.add(checkpoint)
            graph, _ = in_process(fp32_graph, tower.variant, tower.modality, work)
            skeleton_from_graph(graph, target)
            stamp.write()
        require_activation(target, tower)
        found += [target, target.with_suffix(".json")]
    for tower in DRY_TOWERS:
        target = work / "skeletons" / f"{tower.slug}.onnx"
        manifest = Manifest.read(work / "repository" / tower.variant)
        files = manifest.variants["fp32"].tower(tower.modality)
        skeleton_from_graph(work / "repository" / files.model / str(files.version) / files.graph, target)
        require_activation(target, tower)
        found += [target, target.with_suffix(".json")]
    return found


def cut_onnxruntime(wheel: Path, work: Path, architecture: int) -> list[Path]:
    """Return ONNX Runtime's Python files as an archive, and its libraries cut and compressed."""
    folder = work / f"{wheel.name.removesuffix('.whl')}-sm{architecture}"
    done = folder / "done"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if _is_carried(name)]
            archive.extractall(folder / "unpacked", names)
        capi = folder / "unpacked" / "onnxruntime" / "capi"
        cut = cut_library(
            capi / _PROVIDER, folder / _PROVIDER, architecture=architecture, cuobjdump=_cuobjdump(work)
        )
        print(
            f"  device code: {cut.n_kept} of {cut.n_units} units, "
            f"{cut.kept_bytes / 1e6:.1f} of {cut.source_bytes / 1e6:.0f} MB"
        )
        libraries = [folder / _PROVIDER, *(p for p in capi.glob("*.so") if p.name != _PROVIDER)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda path: _compress(path, folder / f"{path.name}.xz"), libraries))
        (folder / _PROVIDER).unlink()
        others = [
            path for path in (folder / "unpacked").rglob("*") if path.is_file() and path.suffix != ".so"
        ]
        _pack_files(others, folder / "onnxruntime.tar.xz", root=folder / "unpacked")
        shutil.rmtree(folder / "unpacked")
        done.touch()
    return [folder / "onnxruntime.tar.xz", *sorted(folder.glob("*.so.xz"))]


def _is_carried(name: str) -> bool:
    if name.startswith("onnxruntime/capi/"):
        return name.endswith((".py", "_cuda.so", "_shared.so")) or "pybind11_state" in name
    return name == "onnxruntime/__init__.py" or name.endswith(".dist-info/METADATA")


def _cuobjdump(work: Path) -> Path:
    """Return NVIDIA's cuobjdump, downloaded from PyPI if it is not on the path."""
    if (installed := shutil.which("cuobjdump")) is not None:
        return Path(installed)
    tool = work / "cuobjdump"
    if not tool.is_file():
        with zipfile.ZipFile(_downloaded(_TOOL, work)) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/bin/cuobjdump")]
            tool.write_bytes(archive.read(name))
        tool.chmod(0o755)
    return tool


def _downloaded(package: str, work: Path) -> Path:
    """Download a package's newest wheel for the machine with the GPU, unless one is there."""
    folder = work / "wheels"
    pattern = f"{package.replace('-', '_')}-*.whl"
    if not (found := sorted(folder.glob(pattern))):
        platforms = [part for name in _PLATFORMS for part in ("--platform", name)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", _PYTHON, "--implementation", "cp", *platforms, "--dest", str(folder)]
        subprocess.run([*command, package], check=True)
        found = sorted(folder.glob(pattern))
    return found[-1]


def _pack_sources(target: Path) -> None:
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *_SOURCES],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    files = [ROOT / name for name in names if not name.startswith(_NOT_CARRIED) and (ROOT / name).is_file()]
    _pack_files(files, target, root=ROOT)


def _pack_packages(target: Path) -> None:
    """Pack the pure Python packages that the runtime needs and such a machine lacks."""
    files = [file for name in _PACKAGES for file in metadata.files(name) or () if file.suffix in _PURE]
    with tarfile.open(target, "w:xz", preset=9) as tar:
        for file in files:
            tar.add(str(file.locate()), str(file), filter=_anonymous)


def _pack_emoji(target: Path) -> None:
    files = [samples_folder() / name for name in ("captions.parquet", "gallery.parquet")]
    with tarfile.open(target, "w") as tar:  # PNG and compressed columns do not compress again
        for path in files:
            tar.add(path, path.name)


def _pack_files(files: Iterable[Path], target: Path, *, root: Path | None = None) -> None:
    with tarfile.open(target, "w:xz", preset=9) as tar:
        for path in files:
            tar.add(path, path.relative_to(root).as_posix() if root else path.name, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _compress(source: Path, target: Path) -> None:
    target.write_bytes(lzma.compress(source.read_bytes(), preset=9))
