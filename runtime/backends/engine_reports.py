"""Reports of the engines: what each can run on this machine, or why it cannot run."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from runtime.backends import require_computes
from runtime.backends.cuda import gpu_facts
from runtime.backends.onnxruntime_build import import_onnxruntime, installed_builds, preload
from runtime.backends.plans import TENSORRT_MAJORS, DeviceFacts
from runtime.errors import EngineError
from runtime.extras import import_optional
from runtime.machine import cpu_model
from runtime.manifest import Engine, Precision

__all__ = ["EngineReport", "engine_reports"]


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What one engine can run here.

    Attributes:
        package: Installed package and version: ``onnxruntime-gpu 1.31.1``; empty if there is none.
        devices: Devices it runs on, with their names; empty if it cannot run.
        precisions: Precisions it computes in on these devices.
        reason: Why it cannot run, and the remedy, in one line; empty if it can.
    """

    engine: Engine
    package: str
    devices: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ()
    reason: str = ""


Runs = tuple[tuple[str, ...], tuple[Precision, ...]]
"""Devices and precisions."""


def engine_reports() -> tuple[EngineReport, ...]:
    """Import every engine and try what it needs; nothing is computed."""
    reports = {
        Engine.ONNXRUNTIME: _onnxruntime,
        Engine.OPENVINO: _openvino,
        Engine.CUDA: _cuda,
        Engine.TENSORRT: _tensorrt,
    }
    return tuple(_report(engine, look) for engine, look in reports.items())


def _report(engine: Engine, look: Callable[[], Runs]) -> EngineReport:
    try:
        devices, precisions = look()
    except EngineError as error:
        return EngineReport(engine, _package(engine), reason=" ".join(str(error).split()))
    return EngineReport(engine, _package(engine), devices, precisions)


def _onnxruntime() -> Runs:
    import_onnxruntime()
    return (f"cpu ({cpu_model()})",), _computed(Engine.ONNXRUNTIME)


def _openvino() -> Runs:
    _imported("openvino", Engine.OPENVINO)
    return (f"cpu ({cpu_model()})",), _computed(Engine.OPENVINO)


def _cuda() -> Runs:
    preload()
    gpus = _gpus()
    return _in_words(gpus), _of_capability(_computed(Engine.CUDA), gpus)


def _tensorrt() -> Runs:
    library = _imported("tensorrt", Engine.TENSORRT)
    version = str(library.__version__)
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) not in TENSORRT_MAJORS:
        supported = " and ".join(map(str, TENSORRT_MAJORS))
        raise EngineError(
            f"TensorRT {version} is installed; babeltower supports the major versions {supported}. Install "
            "one of them."
        )
    gpus = _gpus()
    return _in_words(gpus), _of_capability(tuple(Precision), gpus)


def _imported(module: str, engine: Engine) -> Any:
    """Import an engine's module, and turn any failure to load its libraries into an ``EngineError``."""
    try:
        return import_optional(module, f"The engine {engine.value!r}", f"babeltower[{engine.value}]")
    except EngineError:
        raise
    except Exception as error:  # TensorRT's bindings raise what the loader of their libraries raises
        raise EngineError(
            f"The engine {engine.value!r} is installed, but its libraries cannot be loaded ({error}). "
            f"Install {module} again, with its libraries."
        ) from error


def _computed(engine: Engine) -> tuple[Precision, ...]:
    found = []
    for precision in Precision:
        if precision is Precision.FP8:  # a form of TensorRT's alone
            continue
        with contextlib.suppress(EngineError):
            require_computes(engine, precision)
            found.append(precision)
    return tuple(found)


def _gpus() -> list[DeviceFacts]:
    found = [gpu_facts(0)]
    with contextlib.suppress(EngineError):
        for index in count(1):
            found.append(gpu_facts(index))
    return found


def _in_words(gpus: Sequence[DeviceFacts]) -> tuple[str, ...]:
    return tuple(f"cuda:{index} ({gpu.name})" for index, gpu in enumerate(gpus))


def _of_capability(precisions: Sequence[Precision], gpus: Sequence[DeviceFacts]) -> tuple[Precision, ...]:
    """Return the precisions that some GPU multiplies in."""
    return tuple(p for p in precisions if any(gpu.multiplies_in(p) for gpu in gpus))


def _package(engine: Engine) -> str:
    """Return an engine's installed package and version; nothing is imported."""
    if engine in (Engine.ONNXRUNTIME, Engine.CUDA):
        names = list(installed_builds())
    else:
        names = [engine.value, *(f"tensorrt-cu{major}" for major in (12, 13) if engine is Engine.TENSORRT)]
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return ""
