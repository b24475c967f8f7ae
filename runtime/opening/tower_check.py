"""The opening check: a tower that was just opened must give PyTorch's vectors of a few probes.

The same graph gives other vectors where an engine computes otherwise than on the machine that measured the
model (8-bit products that saturate on a CPU without VNNI, a driver, a damaged weight). So every tower's
version folder holds ``opening.npz``: inputs, PyTorch's vectors, and each engine's cosines at export.
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

from runtime.backends.backend import Backend
from runtime.cosines import row_cosines
from runtime.errors import EngineError, ManifestError, OpeningCheckError
from runtime.machine import has_vnni, machine_in_words
from runtime.manifest import Engine, Manifest, Precision
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
"""How far a cosine may lie under its figure beyond twice what the figure itself lacks of 1.

Rounding noise of another kernel is as large as that of the kernel which was measured, and independent of it:
what a cosine lacks of 1 may double. The rest is for figures near 1. Exact INT8 kernels with other float
kernels around them moved a cosine by 1e-5 at most; saturating ones lose 3 to 33 times the figure's own loss.
"""


class Checks(Enum):
    """Proofs that an opened model owes.

    Attributes:
        ALL: Files fit their checksums, and each tower gives PyTorch's vectors when it is opened.
        OPENING: The vectors alone: the caller has compared the files.
        NONE: Nothing: for what is being measured and has no figures yet.
    """

    ALL = "all"
    OPENING = "opening"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A probe whose vector is not near enough to PyTorch's.

    Attributes:
        probe: Name of the worst one.
        found: Its cosine; NaN where the vector is not finite or has no direction.
        measured: The cosine at export.
        required: The least that passes here.
        n_short: Rows, over all outputs, that fall short.
        n_rows: Rows that were compared.
    """

    probe: str
    output: str
    found: float
    measured: float
    required: float
    n_short: int
    n_rows: int


def opening_cosines(backend: Backend, probes: OpeningProbes) -> dict[str, tuple[float, ...]]:
    """Cosine of each row with PyTorch's vector, for every output of the tower; NaN where there is none.

    Raises:
        EngineError: the backend fails, or its outputs have other shapes.
    """
    names = list(probes.vectors)
    parts = [backend.run(run, names) for run in probes.runs]
    found = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}
    return {name: cosines_of_rows(found[name], probes.vectors[name], name) for name in names}


def cosines_of_rows(
    found: NDArray[Any], expected: NDArray[np.float32], output: str = "vector"
) -> tuple[float, ...]:
    """Cosine of each row with its counterpart; NaN where a row is not finite or zero.

    Raises:
        EngineError: the shapes differ.
    """
    if found.shape != expected.shape:
        raise EngineError(
            f"Output {output!r} has shape {found.shape} for probes of shape {expected.shape}: the graph and "
            "its probes do not belong together. Export the checkpoint again."
        )
    return tuple(row_cosines(found, expected).tolist())


def worst_shortfall(
    cosines: Mapping[str, Sequence[float]], probes: OpeningProbes, *, engine: str, precision: Precision
) -> Shortfall | None:
    """The probe that lies farthest under what it needs, or ``None`` where all hold.

    Raises:
        ManifestError: the probes have no figures of this engine.
    """
    figures = probes.figures.get(engine)
    if figures is None or cosines.keys() - figures.keys():
        raise ManifestError(
            f"The opening probes have figures of {sorted(probes.figures)} for outputs "
            f"{sorted(probes.vectors)}, none of {engine} for {sorted(cosines)}. Export the "
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
) -> None:
    """Hold an opened tower to PyTorch's vectors of its probes.

    Args:
        tower: Its Triton model's name, for the message.
        others: What may be opened instead, in words.
        note: What else the message says of the figures.

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
            precision=precision,
            others=others,
            note=note,
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
    precision: Precision,
    others: str,
    note: str = "",
) -> str:
    """A failed opening check in words: what was found, where, against what, and the remedy."""
    found = "not finite or zero" if np.isnan(worst.found) else f"at a cosine of {worst.found:.6f}"
    head = worst.output if worst.output == "vector" else f"the head {worst.output}"
    saturates = precision is Precision.INT8 and has_vnni() is False
    return (
        f"{tower} does not give PyTorch's vectors on this machine: {head} of {worst.probe} is {found} with "
        f"PyTorch's; the export measured {worst.measured:.6f}, and at least {worst.required:.6f} is required "
        f"({worst.n_short} of {worst.n_rows} vectors fall short). Computed by {computed} on "
        f"{machine_in_words()}; measured on {_machine_of(probes.measured_on)}.{note}"
        + (" This CPU has no VNNI, and sums of 8-bit products may saturate on it." if saturates else "")
        + f" Export the checkpoint again on this machine, or open {others}. Where files may be damaged, "
        "`babeltower inspect` compares them with their checksums: copy the repository again."
    )


def _machine_of(measured_on: Mapping[str, Any]) -> str:
    if not measured_on:
        return "a machine that was not recorded"
    sets = ", ".join(measured_on.get("instruction_sets", ())) or "instruction sets unknown"
    return f"{measured_on.get('cpu', 'an unknown CPU')} ({sets})"


def others_in_words(manifest: Manifest, engine: Engine, precision: Precision) -> str:
    """Other ways to open a model, in words: ``precision='fp32' with engine='onnxruntime' or …``."""
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
    """Version of an engine that is imported."""
    module = sys.modules.get(engine.value)
    return str(getattr(module, "__version__", "of unknown version"))
