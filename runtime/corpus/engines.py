"""Choice of engine, precision, instances and threads for a corpus: given, from the journal, or measured."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends import is_installed, module_of_engine
from runtime.counts import require_threads
from runtime.device import Device
from runtime.errors import BabeltowerError, CorpusError
from runtime.extras import install_hint
from runtime.local import LocalEncoder
from runtime.losses import loss_in_words, reason_against
from runtime.machine import n_cores
from runtime.manifest import GPU_ENGINES, Engine, Manifest, Modality, Precision
from runtime.opening.tower_check import Checks
from runtime.preprocessing.batching import padded_batch
from runtime.preprocessing.text import Text

__all__ = ["EngineChoice", "choice_from_arguments", "open_encoder", "runs_at_once"]

_MEASURED_S = 1.0
_TEXTS, _IMAGES = 64, 8
_GPU_TEXTS, _GPU_IMAGES = 512, 128
_TEXT = "a text about as long as most captions are, twenty tokens"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Engine settings of a run; fields that are ``None`` are chosen by measurement.

    Attributes:
        instances: Concurrent runs.
        threads: Threads per run; on a GPU, 1.
        device: Where the engine runs; ``None`` for the processor.
        measured: ``engine precision instances×threads`` → rows per second, for measured candidates.
        reasons: One sentence for each chosen or rejected candidate.
    """

    engine: Engine | None = None
    precision: Precision | None = None
    instances: int | None = None
    threads: int | None = None
    device: Device | None = None
    measured: Mapping[str, float] | None = None
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("instances", "threads"):
            require_threads(getattr(self, name), name, error=CorpusError)

    @property
    def is_whole(self) -> bool:
        """True if engine, precision, instances and threads are all set."""
        return None not in (self.engine, self.precision, self.instances, self.threads)

    @property
    def name(self) -> str:
        """Name of the choice, such as ``openvino int8 2×1``; unset fields are ``?``."""
        engine = "?" if self.engine is None else self.engine.value
        precision = "?" if self.precision is None else self.precision.value
        return f"{engine} {precision} {self.instances or '?'}×{self.threads or '?'}"

    def deciding(self) -> dict[str, Any]:
        """Return the settings that affect the vectors, as plain values; instances do not."""
        return {
            "engine": None if self.engine is None else self.engine.value,
            "precision": None if self.precision is None else self.precision.value,
            "threads": self.threads,
        }


def open_encoder(
    model: str | os.PathLike[str],
    choice: EngineChoice,
    language: str | None,
    *,
    checks: Checks = Checks.ALL,
    cache: Path | None = None,
) -> LocalEncoder:
    """Open a model with the chosen engine; ``cache`` as in ``Encoder.open``."""
    if choice.engine is None or choice.precision is None:
        raise CorpusError(f"Engine or precision is not chosen yet: {choice.name}.")
    return LocalEncoder.from_repository(
        model,
        engine=choice.engine,
        precision=choice.precision,
        threads=choice.threads,
        instances=choice.instances or 1,
        default_language=language,
        verify=checks,
        cache=cache,
        device=choice.device,
    )


def choice_from_arguments(
    asked: EngineChoice,
    known: Mapping[str, Any] | None,
    *,
    model: str | os.PathLike[str],
    modality: Modality,
    cache: Path | None = None,
) -> EngineChoice:
    """Fill in unset fields from the journal of the resumed run, or by measuring.

    A precision that was not requested is used only if its measured loss in the manifest is within the
    limits, and if the tower reproduces PyTorch's vectors on this machine.

    Args:
        known: The journal's arguments.
        cache: As in ``Encoder.open``.

    Raises:
        CorpusError: no installed engine can run any variant of the model.
    """
    choice = asked
    if choice.engine in GPU_ENGINES or (choice.device is not None and choice.device.is_gpu):
        choice = replace(choice, instances=choice.instances or 1, threads=1)
    if known is not None and choice.engine is None and known.get("engine") is not None:
        choice = replace(choice, engine=Engine(known["engine"]))
        if choice.device is not None and choice.device.is_gpu is not (choice.engine in GPU_ENGINES):
            raise CorpusError(
                f"The output folder holds vectors of {known['engine']}, which does not run on "
                f"{choice.device}. Resume on the same device, or choose another output folder."
            )
    if known is not None and choice.precision is None and known.get("precision") is not None:
        choice = replace(choice, precision=Precision(known["precision"]))
    if known is not None and choice.threads is None:
        choice = replace(choice, threads=known.get("threads"))
    if choice.instances is None and choice.threads is not None:
        choice = replace(choice, instances=max(1, n_cores() // choice.threads))
    if choice.threads is None and choice.instances is not None:
        choice = replace(choice, threads=max(1, n_cores() // choice.instances))
    return choice if choice.is_whole else _measured(choice, model, modality, cache)


def _measured(
    choice: EngineChoice, model: str | os.PathLike[str], modality: Modality, cache: Path | None
) -> EngineChoice:
    """Return the fastest candidate, first by engine and precision, then by instances × threads."""
    rates: dict[str, float] = {}
    failures: list[str] = []

    def rate(candidate: EngineChoice) -> float:
        if candidate.name not in rates:
            try:
                rates[candidate.name] = rows_per_second(model, candidate, modality, cache=cache)
            except BabeltowerError as error:
                failures.append(f"{candidate.name} was dropped: {error}")
                rates[candidate.name] = 0.0
        return rates[candidate.name]

    manifest = Manifest.read(model)
    candidates, left_out = _candidates(choice, manifest, os.fspath(model))
    if len(candidates) > 1 or choice.instances is None:
        shapes = _shapes(choice)
        best = max((_shaped(c, shapes[0]) for c in candidates), key=rate)
        best = max((_shaped(best, shape) for shape in shapes), key=rate)
    else:
        best = candidates[0]
    if rates and not any(rates.values()):
        raise CorpusError(f"No engine on this machine runs {os.fspath(model)}: {' '.join(failures)}")
    return replace(
        best,
        measured={name: round(value, 1) for name, value in rates.items() if value},
        reasons=(_why(best, manifest, rates.get(best.name)), *left_out, *failures),
    )


def _why(best: EngineChoice, manifest: Manifest, rate: float | None) -> str:
    assert best.engine is not None, "a candidate has an engine"
    assert best.precision is not None, "a candidate has a precision"
    variant = manifest.variant(best.precision, best.engine.value)
    measured = "the only candidate" if rate is None else f"{rate:,.1f} rows/s, the fastest measured"
    return f"chose {best.name}: {measured}; {loss_in_words(variant, best.engine.value)}"


def _candidates(choice: EngineChoice, manifest: Manifest, model: str) -> tuple[list[EngineChoice], list[str]]:
    """Return the candidates, and the reasons against other variants that an installed engine runs."""
    found: list[EngineChoice] = []
    left_out: list[str] = []
    for precision, engine in manifest_pairs(manifest):
        if choice.engine not in (None, engine) or choice.precision not in (None, precision):
            continue
        if engine is not choice.engine and not _may_run(engine, choice.device):
            continue
        reason = None
        if choice.precision is None:
            reason = reason_against(manifest.variant(precision, engine.value), engine.value)
        if reason is None:
            found.append(replace(choice, engine=engine, precision=precision))
        else:
            left_out.append(
                f"{engine.value} {precision.value} was not considered: {reason}; pass --precision "
                f"{precision.value} to use it"
            )
    if not found:
        pairs = [f"{engine.value} {precision.value}" for precision, engine in manifest_pairs(manifest)]
        raise CorpusError(
            f"{model} has no variant {_asked_in_words(choice)} that an installed engine runs; it has {pairs}."
            + "".join(f" {line}." for line in [*left_out, *_missing_engines(manifest)])
            + f" Pass one of these, or export the checkpoint with {_export_options(choice)}."
        )
    return found, left_out


def _asked_in_words(choice: EngineChoice) -> str:
    asked = [
        *([] if choice.precision is None else [f"in {choice.precision.value}"]),
        *([] if choice.engine is None else [f"for {choice.engine.value}"]),
        f"on {choice.device or 'cpu'}",
    ]
    return " ".join(asked)


def _export_options(choice: EngineChoice) -> str:
    on_gpu = choice.device is not None and choice.device.is_gpu
    engine = choice.engine or (Engine.CUDA if on_gpu else Engine.ONNXRUNTIME)
    return f"--engine {engine.value} --precision {(choice.precision or Precision.FP32).value}"


def _missing_engines(manifest: Manifest) -> list[str]:
    """Say how to install each engine that the model was exported for and that is not installed."""
    engines = {engine for _, engine in manifest_pairs(manifest)}
    missing = {module_of_engine(engine) for engine in engines if not is_installed(engine)}
    return [f"{module} is not installed. {install_hint(module)}" for module in sorted(missing)]


def _may_run(engine: Engine, device: Device | None) -> bool:
    """Return True if an engine is installed and belongs to the device; a GPU must be asked for."""
    on_gpu = device is not None and device.is_gpu
    return (engine in GPU_ENGINES) is on_gpu and is_installed(engine)


def manifest_pairs(manifest: Manifest) -> list[tuple[Precision, Engine]]:
    """Return every precision with each engine that may open it."""
    return [
        (variant.precision, Engine(engine))
        for variant in manifest.variants.values()
        for engine in variant.engines
    ]


def _shaped(choice: EngineChoice, shape: tuple[int, int]) -> EngineChoice:
    return replace(choice, instances=shape[0], threads=shape[1])


def _shapes(choice: EngineChoice) -> list[tuple[int, int]]:
    """Return the (instances, threads) to try; one thread per run first, the fastest on most machines."""
    if choice.instances is not None and choice.threads is not None:
        return [(choice.instances, choice.threads)]
    cores = n_cores()
    threads = sorted({1, *(n for n in (2, 4) if cores >= 2 * n), cores})
    return [(max(1, cores // n), n) for n in threads]


def rows_per_second(
    model: str | os.PathLike[str], choice: EngineChoice, modality: Modality, *, cache: Path | None = None
) -> float:
    """Measure one candidate for about a second, on all its instances at once.

    Raises:
        OpeningCheckError: its vectors differ from PyTorch's on this machine. File checksums are verified
            only once a candidate is chosen.
    """
    manifest = Manifest.read(model)
    language = manifest.languages[0] if manifest.text.needs_language else None
    with open_encoder(model, choice, language, checks=Checks.OPENING, cache=cache) as encoder:
        run, n_rows = _work(encoder, modality)
        run()
        started = time.perf_counter()
        n_runs = runs_at_once(run, instances=choice.instances or 1, seconds=_MEASURED_S)
        return n_rows * n_runs / (time.perf_counter() - started)


def runs_at_once(run: Callable[[], Any], *, instances: int, seconds: float) -> int:
    """Call ``run`` on one thread per instance until the time is over, and return the number of calls.

    Raises:
        BabeltowerError: a run failed.
    """
    counts = [0] * instances
    deadline = time.perf_counter() + seconds
    failed: list[BaseException] = []
    interrupted = threading.Event()

    def loop(number: int) -> None:
        try:
            while time.perf_counter() < deadline and not interrupted.is_set():
                run()
                counts[number] += 1
        except BaseException as error:  # raised below; it would end the thread, and be seen by nobody
            failed.append(error)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(instances)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # an engine must not be closed while it runs
        interrupted.set()
        for thread in threads:
            thread.join()
        raise
    if failed:
        raise failed[0]
    return sum(counts)


def _work(encoder: LocalEncoder, modality: Modality) -> tuple[Callable[[], Any], int]:
    if modality is Modality.IMAGE:
        size = encoder.manifest.image
        n_images = _GPU_IMAGES if encoder.on_gpu else _IMAGES
        pixels = np.zeros((n_images, 3, size.height, size.width), dtype=np.uint8)
        return lambda: encoder.vectors_from_pixels(pixels), n_images
    n_texts = _GPU_TEXTS if encoder.on_gpu else _TEXTS
    rows = encoder.token_rows([Text(_TEXT, 0, None)]) * n_texts
    batch = padded_batch([row.ids for row in rows], range(n_texts), pad_id=encoder.manifest.text.pad_id)
    return lambda: encoder.vectors_from_tokens(batch), n_texts
