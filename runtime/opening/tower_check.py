"""Opening check: a newly opened tower must reproduce PyTorch's vectors for a few probes.

The same graph can give other vectors than on the machine that measured the model: 8-bit products saturate on
a CPU without VNNI, a driver differs, a weight is damaged. So every tower's version folder has
``opening.npz`` with inputs, PyTorch's vectors, and each engine's cosines at export.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import module_of_engine
from runtime.backends.backend import Backend
from runtime.backends.cuda import gpu_in_words, gpu_record
from runtime.cosines import row_cosines
from runtime.errors import EngineError, ManifestError, OpeningCheckError
from runtime.machine import has_vnni, machine_in_words
from runtime.manifest import GPU_ENGINES, Engine, Manifest, Precision
from runtime.opening.probes import OpeningProbes

__all__ = [
    "Checks",
    "Shortfall",
    "cosines_of_rows",
    "engine_version",
    "message_of_shortfall",
    "opening_cosines",
    "others_in_words",
    "require_opening",
    "worst_shortfall",
]

_SLACK: Mapping[Precision, float] = {
    Precision.FP32: 1e-5,
    Precision.FP16: 5e-4,
    Precision.BF16: 2e-3,
    Precision.INT8: 2e-3,
    Precision.FP8: 2e-3,
}
"""Tolerance of a cosine, in addition to twice the distance of its exported figure from 1.

Rounding noise of another kernel is independent of the measured kernel's and as large, so the distance from 1
may double; the tolerance matters for figures near 1. With exact INT8 kernels, other float kernels changed a
cosine by at most 1e-5; saturating INT8 kernels lose 3 to 33 times the figure's own loss. It is the same on
every engine: the probes run in the shapes that were measured, so a GPU chooses the same kernels again.
"""


class Checks(Enum):
    """Checks of an opened model.

    Attributes:
        ALL: Verify file checksums, and each tower's vectors when it is opened.
        OPENING: Verify only the vectors; the caller has verified the files.
        NONE: Verify nothing; for models that are being measured and have no figures yet.
    """

    ALL = "all"
    OPENING = "opening"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Failed check: the probe whose vector is farthest below the required cosine.

    Attributes:
        probe: Name of the worst probe.
        found: Its cosine; NaN if the vector is not finite or has no direction.
        measured: Its cosine at export.
        required: Lowest cosine that passes.
        n_short: Number of failing rows, over all outputs.
        n_rows: Number of compared rows.
    """

    probe: str
    output: str
    found: float
    measured: float
    required: float
    n_short: int
    n_rows: int


def opening_cosines(backend: Backend, probes: OpeningProbes) -> dict[str, tuple[float, ...]]:
    """Run the probes; return each row's cosine with PyTorch's vector per output, NaN if undefined.

    Raises:
        EngineError: the backend fails, or its outputs have unexpected shapes.
    """
    names = list(probes.vectors)
    parts = [backend.run(run, names) for run in probes.runs]
    found = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}
    return {name: cosines_of_rows(found[name], probes.vectors[name], name) for name in names}


def cosines_of_rows(
    found: NDArray[Any], expected: NDArray[np.float32], output: str = "vector"
) -> tuple[float, ...]:
    """Return the cosine of each row with its counterpart; NaN if a row is not finite or zero.

    Raises:
        EngineError: the shapes differ.
    """
    if found.shape != expected.shape:
        raise EngineError(
            f"Output {output!r} has shape {found.shape}, but its probes have shape {expected.shape}: the "
            "graph does not match its probes. Export the checkpoint again."
        )
    return tuple(row_cosines(found, expected).tolist())


def worst_shortfall(
    cosines: Mapping[str, Sequence[float]], probes: OpeningProbes, *, engine: str, precision: Precision
) -> Shortfall | None:
    """Return the probe farthest below its required cosine, or ``None`` if all pass.

    Raises:
        ManifestError: the probes have no figures of this engine.
    """
    figures = probes.figures.get(engine)
    if figures is None or cosines.keys() - figures.keys():
        raise ManifestError(
            f"The opening probes have figures of {sorted(probes.figures)} for outputs "
            f"{sorted(probes.vectors)}, but none of {engine} for {sorted(cosines)}. Export the "
            "checkpoint again with this engine."
        )
    short: list[tuple[float, Shortfall]] = []
    n_rows = sum(map(len, cosines.values()))
    for output, found in cosines.items():
        for row, (cosine, figure) in enumerate(zip(found, figures[output], strict=True)):
            required = 1 - 2 * (1 - figure) - _SLACK[precision]
            if not cosine >= required:
                missing = np.inf if np.isnan(cosine) else required - cosine
                name = probes.name_of_row(row)
                short.append((missing, Shortfall(name, output, cosine, figure, required, 0, n_rows)))
    if not short:
        return None
    worst = max(short, key=lambda entry: entry[0])[1]
    return dataclasses.replace(worst, n_short=len(short))


def require_opening(
    backend: Backend,
    probes: OpeningProbes,
    *,
    tower: str,
    engine: Engine,
    precision: Precision,
    others: str = "another precision or engine of the model",
    note: str = "",
    gpu: int = 0,
) -> None:
    """Check that an opened tower reproduces PyTorch's vectors for its probes.

    Args:
        tower: Name of the tower's Triton model, for the message.
        others: Alternatives to open instead, in words.
        note: Remark on the figures, added to the message.
        gpu: Number of the GPU, for an engine that runs on one.

    Raises:
        OpeningCheckError: a vector is not finite, or farther from PyTorch's than the figures allow.
        EngineError: the backend fails.
    """
    cosines = opening_cosines(backend, probes)
    worst = worst_shortfall(cosines, probes, engine=engine.value, precision=precision)
    if worst is None:
        return
    raise OpeningCheckError(
        message_of_shortfall(
            worst,
            probes,
            tower=tower,
            computed=f"{engine.value} {engine_version(engine)} in {precision.value}",
            engine=engine,
            precision=precision,
            others=others,
            note=note,
            gpu=gpu,
        ),
        tower=tower,
        probe=worst.probe,
        cosine=worst.found,
        required=worst.required,
    )


def message_of_shortfall(
    worst: Shortfall,
    probes: OpeningProbes,
    *,
    tower: str,
    computed: str,
    engine: Engine,
    precision: Precision,
    others: str,
    note: str = "",
    gpu: int = 0,
) -> str:
    """Describe a failed opening check: found and required cosines, computation, machines and remedy."""
    found = "not finite or zero" if np.isnan(worst.found) else f"at a cosine of {worst.found:.6f}"
    head = worst.output if worst.output == "vector" else f"the head {worst.output}"
    on_cpu = engine not in GPU_ENGINES
    where = machine_in_words() if on_cpu else gpu_in_words(gpu_record(gpu))
    saturates = on_cpu and precision is Precision.INT8 and has_vnni() is False
    return (
        f"{tower} does not reproduce PyTorch's vectors on this machine: {head} of {worst.probe} is {found} "
        f"with PyTorch's; the export measured {worst.measured:.6f}, and at least {worst.required:.6f} is "
        f"required ({worst.n_short} of {worst.n_rows} vectors fail). Computed by {computed} on "
        f"{where}; measured on {_machine_of(probes.measured_on)}.{note}"
        + (" This CPU has no VNNI, so sums of 8-bit products may saturate." if saturates else "")
        + f" Export the checkpoint again on this machine, or open {others}. If files may be damaged, verify "
        "their checksums with `babeltower inspect`, and copy the repository again."
    )


def _machine_of(measured_on: Mapping[str, Any]) -> str:
    if not measured_on:
        return "a machine that was not recorded"
    if "gpu" in measured_on:
        return gpu_in_words(measured_on)
    sets = ", ".join(measured_on.get("instruction_sets", ())) or "instruction sets unknown"
    return f"{measured_on.get('cpu', 'an unknown CPU')} ({sets})"


def others_in_words(manifest: Manifest, engine: Engine, precision: Precision) -> str:
    """Describe other ways to open a model: ``precision='fp32' with engine='onnxruntime' or …``."""
    pairs = sorted(
        {
            (variant.precision is not Precision.FP32, variant.precision.value, name)
            for variant in manifest.variants.values()
            for name in variant.engines
        }
    )
    named = [
        f"precision={found!r} with engine={name!r}"
        for _, found, name in pairs
        if (found, name) != (precision.value, engine.value)
    ]
    return " or ".join(named) if named else "another variant, once it is exported (this model has no other)"


def engine_version(engine: Engine) -> str:
    """Return the version of an imported engine."""
    module = sys.modules.get(module_of_engine(engine))
    return str(getattr(module, "__version__", "of unknown version"))
