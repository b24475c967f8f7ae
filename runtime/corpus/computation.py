"""Identity of the computation behind vectors: graphs, engine, processor and preprocessing libraries.

Vectors with the same fingerprint are comparable, but bit-identical only under the same computation. A corpus
is embedded by one computation, unless the user accepts a named change; its graphs must never change.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from runtime.backends import version_of_engine
from runtime.backends.cuda import gpu_in_words, gpu_record
from runtime.corpus.engines import EngineChoice
from runtime.encoder import Encoder
from runtime.errors import CorpusError
from runtime.local import LocalEncoder
from runtime.machine import cpu_model, instruction_sets
from runtime.manifest import GPU_ENGINES, Modality
from runtime.opening.probes import OPENING_FILE

if TYPE_CHECKING:
    from runtime.remote import RemoteEncoder

__all__ = ["Computation", "ComputationChange", "computation_of", "differences", "require_acceptable"]

Computation: TypeAlias = "Mapping[str, Any]"
"""Plain values under ``graphs`` and the members of ``ComputationChange``, as stored in the journal."""

_LIBRARIES = {Modality.TEXT: ("tokenizers", "ftfy"), Modality.IMAGE: ("pillow", "simplejpeg")}
"""Libraries that produce token ids and pixels."""


class ComputationChange(str, Enum):
    """Parts of a computation that a resumed run may change, if explicitly accepted."""

    ENGINE = "engine"
    CPU = "cpu"
    LIBRARIES = "libraries"


def computation_of(encoder: Encoder, choice: EngineChoice, modality: Modality) -> Computation:
    """Describe the computation that embeds a modality on this machine.

    A server's graphs, engine version and processor are unknown here; only its engine and variant are.
    """
    if not isinstance(encoder, LocalEncoder):
        served = cast("RemoteEncoder", encoder).served
        return {"graphs": {}, "engine": f"{served.engine} of a server, {served.variant}"}
    if choice.engine is None or choice.precision is None:
        raise CorpusError(f"Engine or precision is not chosen yet: {choice.name}.")
    variant = encoder.manifest.variant(choice.precision, choice.engine.value)
    tower = variant.tower(modality)
    version = PurePosixPath(tower.model) / str(tower.version)
    files = {record.path: record.sha256 for record in tower.files}
    graphs = {
        PurePosixPath(path).name: sha256
        for path, sha256 in files.items()
        if (PurePosixPath(path).is_relative_to(version) and PurePosixPath(path).name != OPENING_FILE)
        or path == variant.tokenizer
    }
    return {
        "graphs": dict(sorted(graphs.items())),
        "engine": f"{choice.engine.value} {version_of_engine(choice.engine)}",
        "cpu": _processor(choice),
        "libraries": ", ".join(filter(None, map(_installed, _LIBRARIES[modality]))),
    }


def _processor(choice: EngineChoice) -> str:
    """Name what computes: the processor and its instruction sets, or the GPU and its driver."""
    if choice.engine in GPU_ENGINES:
        return gpu_in_words(gpu_record(0 if choice.device is None else choice.device.gpu or 0))
    return f"{cpu_model()}: {' '.join(instruction_sets())}"


def differences(one: Computation, other: Computation) -> dict[str, str]:
    """Return the parts that differ, each with its old and new value in words."""
    found = {
        change.value: f"{change.value} was {one.get(change.value)!r} and is now {other.get(change.value)!r}"
        for change in ComputationChange
        if one.get(change.value) != other.get(change.value)
    }
    before, after = one.get("graphs", {}), other.get("graphs", {})
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if names:
        found["graphs"] = "; ".join(
            f"{name} had sha256 {str(before.get(name))[:12]}… and now has {str(after.get(name))[:12]}…"
            for name in names
        )
    return found


def require_acceptable(
    known: Iterable[Computation],
    own: Computation,
    accepted: Collection[ComputationChange],
    *,
    holder: Path | str,
) -> None:
    """Check that new vectors may be added to those of earlier computations.

    Args:
        known: Computations of the vectors so far; one must equal ``own`` except for accepted changes.
        holder: Folder or file with the vectors, for the error message.

    Raises:
        CorpusError: another part has changed; the message names the changes and the remedy.
    """
    apart = [differences(computation, own) for computation in known]
    if not apart or any(set(found) <= {change.value for change in accepted} for found in apart):
        return
    nearest = min(apart, key=len)
    refused = [name for name in nearest if name not in {change.value for change in accepted}]
    remedy = "Resume with the original setup, or choose another output folder"
    if "graphs" not in nearest:
        remedy += f"; --accept-changed {','.join(refused)} resumes anyway and records it in the journal"
    raise CorpusError(
        f"{holder} holds vectors of another computation: {'; '.join(nearest.values())}. New vectors would "
        f"differ slightly. {remedy}."
    )


def _installed(distribution: str) -> str | None:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return None
