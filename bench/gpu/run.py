"""Run the steps on a machine with a GPU: each in its own process, with its own time limit."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.bundle import BUNDLE_FACTS
from bench.gpu.lines import LINES, QUIET, RECORD, Bench, read_lines, remove_leftovers
from bench.gpu.parts.packing import unpack_folder
from bench.gpu.summary import summary_of_lines
from runtime.errors import BabeltowerError

__all__ = ["STEPS", "GpuStep", "require_runnable", "run_steps", "unpack"]


@dataclass(frozen=True, slots=True)
class GpuStep:
    """Step of a run.

    Attributes:
        name: Name.
        limit_s: Most time that it gets, in seconds.
        beside: The next step may begin while this one runs.
        joins: May begin while such steps run, and takes no times until they have ended; every other step
            begins after they have ended.
    """

    name: str
    limit_s: float
    beside: bool = False
    joins: bool = False


STEPS = (
    GpuStep("machine", 60),
    GpuStep("smoke", 60, beside=True, joins=True),
    GpuStep("gate", 150, beside=True, joins=True),
    GpuStep("speed", 280, joins=True),
    GpuStep("autotune", 90),
    GpuStep("record", 30),
)
"""In order of worth, but for the record, which is always written."""

_RECORD_S = 15.0
_RESULTS = (LINES, RECORD)
_SITE, _PACKAGES = "site", "packages"


def require_runnable(bundle: Path, out: Path, steps: Sequence[str]) -> None:
    """Check the arguments of a run before anything is written.

    Raises:
        BabeltowerError: the folder is no bundle, the results' folder is a file, or a step is unknown.
    """
    if not (bundle / BUNDLE_FACTS).is_file():
        raise BabeltowerError(
            f"{bundle} is not a bundle: it has no {BUNDLE_FACTS}. Build one with `make gpu`."
        )
    if out.exists() and not out.is_dir():
        raise BabeltowerError(f"{out} is a file; pass a folder for the results.")
    known = [step.name for step in STEPS]
    if unknown := [name for name in steps if name not in known]:
        raise BabeltowerError(f"Step {unknown[0]!r} is unknown; expected some of {known}.")


def unpack(bundle: Path, work: Path, *, dry: bool) -> None:
    """Unpack the bundle's parts into the work folder; in a dry run, without ONNX Runtime for GPUs."""
    with ThreadPoolExecutor() as pool:
        tasks = [
            pool.submit(unpack_folder, bundle / "samples.pack", work / "samples" / "repository"),
            pool.submit(_extract, bundle / "emoji.tar", work / "samples" / "emoji"),
            pool.submit(_extract, bundle / "skeletons.tar.xz", work / "skeletons"),
            pool.submit(_extract, bundle / "packages.tar.xz", work / _PACKAGES),
        ]
        if not dry:
            tasks.append(pool.submit(_extract, bundle / "onnxruntime.tar.xz", work / _SITE))
            capi = work / _SITE / "onnxruntime" / "capi"
            tasks += [pool.submit(_decompress, packed, capi) for packed in sorted(bundle.glob("*.so.xz"))]
        for task in tasks:
            task.result()


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _decompress(packed: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / packed.name.removesuffix(".xz")).write_bytes(lzma.decompress(packed.read_bytes()))


def run_steps(bundle: Path, out: Path, work: Path, *, minutes: float, dry: bool, only: list[str]) -> int:
    """Run the steps in order and print what each took; return the number of steps that failed.

    Nothing of an earlier run is used: its temporary files are removed, and its results are moved aside unless
    only their record is written again.
    """
    begun = time.time()
    steps = [step for step in STEPS if not only or step.name in only]
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    remove_leftovers(work)
    if [step.name for step in steps] != ["record"]:
        for moved in _move_results_aside(out):
            print(f"an earlier run's results are now {moved}", flush=True)
    unpack(bundle, work, dry=dry)
    print(f"unpacked in {time.time() - begun:.0f} s", flush=True)
    outcomes: list[str] = []
    beside: list[threading.Thread] = []
    quiet = work / QUIET
    quiet.touch()

    def perform_step(step: GpuStep, limit_s: float) -> None:
        started = time.time()
        outcome = _run(step.name, bundle, out, work, dry=dry, ends_at=started + limit_s)
        outcomes.append(outcome)
        print(f"{step.name}: {outcome}, {time.time() - started:.0f} s", flush=True)

    for step in steps:
        if not step.joins:
            _touch_after(quiet, beside)
        left = minutes * 60 - (time.time() - begun) - (0 if step.name == "record" else _RECORD_S)
        if left < _RECORD_S and step.name != "record":
            print(f"{step.name}: no time left", flush=True)
            continue
        limit_s = min(max(left, _RECORD_S), step.limit_s)
        if step.beside:
            quiet.unlink(missing_ok=True)
            beside.append(threading.Thread(target=perform_step, args=(step, limit_s)))
            beside[-1].start()
        else:
            waiting = threading.Thread(target=_touch_after, args=(quiet, tuple(beside)))
            waiting.start()
            perform_step(step, limit_s)
            waiting.join()
    _touch_after(quiet, beside)
    if (out / LINES).is_file():
        for text in summary_of_lines(list(read_lines(out / LINES))):
            print(text, flush=True)
    return sum(outcome != "done" for outcome in outcomes)


def _move_results_aside(out: Path) -> Iterator[Path]:
    """Rename the results of an earlier run in the folder, to the first number that is free."""
    number = 1
    while any((out / f"earlier-{number}-{name}").exists() for name in _RESULTS):
        number += 1
    for name in _RESULTS:
        if (out / name).exists():
            yield (out / name).rename(out / f"earlier-{number}-{name}")


def _touch_after(file: Path, threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
    file.touch()


def _run(name: str, bundle: Path, out: Path, work: Path, *, dry: bool, ends_at: float) -> str:
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "step",
        name,
        str(bundle),
        str(out),
        str(work),
        str(ends_at),
    ]
    process = subprocess.Popen(
        [*command, *(["--dry"] if dry else [])],
        env=_environment(work, dry=dry),
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=max(1.0, ends_at + 5 - time.time()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return "out of time"
    return "done" if code == 0 else f"failed with exit code {code}"


def _environment(work: Path, *, dry: bool) -> Mapping[str, str]:
    """Return the environment of a step: our ONNX Runtime first, CUDA's libraries where pip puts them."""
    paths = [str(work / _PACKAGES)] if dry else [str(work / _SITE), str(work / _PACKAGES)]
    paths += [path for path in sys.path if path]
    libraries = [str(lib) for path in sys.path for lib in sorted(Path(path).glob("nvidia/*/lib"))]
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(
            os.pathsep
        ),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "TOKENIZERS_PARALLELISM": "false",
    }


def perform(name: str, bench: Bench, *, part: str, until: float) -> None:
    """Perform one step, or one part of it, in this process."""
    match name:
        case "machine":
            from bench.gpu.machine import measure_machine

            measure_machine(bench)
        case "smoke":
            from bench.gpu.smoke import try_forms

            try_forms(bench)
        case "gate":
            from bench.gpu.gate import judge_all, judge_part

            judge_part(bench, part) if part else judge_all(bench)
        case "speed":
            from bench.gpu.speed import perform_part, time_all

            perform_part(bench, part, until) if part else time_all(bench)
        case "autotune":
            from bench.gpu.tower_times import time_autotuned

            time_autotuned(bench)
        case "record":
            from bench.gpu.results import write_record

            write_record(bench.bundle, bench.out)
        case _:
            raise BabeltowerError(f"Step {name!r} is unknown; known are {[step.name for step in STEPS]}.")
