"""Identity of the computation that makes vectors: graphs, engine, processor, libraries before the tower.

Vectors of one fingerprint may be compared, but they are equal to the last bit only under one computation. A
corpus is embedded by one, unless its owner accepts a change by name; its graphs never change.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from runtime.backends import version_of_engine
from runtime.corpus.engines import EngineChoice
from runtime.encoder import Encoder
from runtime.errors import CorpusError
from runtime.local import LocalEncoder
from runtime.machine import cpu_model, instruction_sets
from runtime.manifest import Modality
from runtime.opening.probes import OPENING_FILE

if TYPE_CHECKING:
    from runtime.remote import RemoteEncoder

__all__ = ["Computation", "ComputationChange", "computation_of", "differences", "require_acceptable"]

Computation: TypeAlias = "Mapping[str, Any]"
"""Plain values under ``graphs`` and the members of ``ComputationChange``, as the journal keeps them."""

_LIBRARIES = {Modality.TEXT: ("tokenizers", "ftfy"), Modality.IMAGE: ("pillow", "simplejpeg")}
"""What makes token ids and pixels."""


class ComputationChange(str, Enum):
    """Parts of a computation that may be other ones in a resumed run, where that is asked for."""

    ENGINE = "engine"
    CPU = "cpu"
    LIBRARIES = "libraries"


def computation_of(encoder: Encoder, choice: EngineChoice, modality: Modality) -> Computation:
    """Describe what will make the vectors of a modality on this machine.

    A server's graphs, engine version and processor are its own: only the variant is known here.
    """
    if not isinstance(encoder, LocalEncoder):
        served = cast("RemoteEncoder", encoder).served
        return {"graphs": {}, "engine": f"{served.engine} of a server, {served.variant}"}
    if choice.engine is None or choice.precision is None:
        raise CorpusError(f"The engine is not chosen yet: {choice.name}.")
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
        "cpu": f"{cpu_model()}: {' '.join(instruction_sets())}",
        "libraries": ", ".join(filter(None, map(_installed, _LIBRARIES[modality]))),
    }


def differences(one: Computation, other: Computation) -> dict[str, str]:
    """Parts that differ, each with what it was and is."""
    found = {
        change.value: f"{change.value} was {one.get(change.value)!r} and is now {other.get(change.value)!r}"
        for change in ComputationChange
        if one.get(change.value) != other.get(change.value)
    }
    before, after = one.get("graphs", {}), other.get("graphs", {})
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if names:
        found["graphs"] = "; ".join(
            f"{name} had the sha256 {str(before.get(name))[:12]}… and has {str(after.get(name))[:12]}…"
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
    """Refuse to add vectors of another computation to those that are there.

    Args:
        known: Computations of the vectors so far; one of them must be ``own`` but for what is accepted.
        holder: What holds the vectors, for errors.

    Raises:
        CorpusError: naming all that changed and what can be done.
    """
    apart = [differences(computation, own) for computation in known]
    if not apart or any(set(found) <= {change.value for change in accepted} for found in apart):
        return
    nearest = min(apart, key=len)
    refused = [name for name in nearest if name not in {change.value for change in accepted}]
    remedy = "Go on with what the run was begun with, or choose another output folder"
    if "graphs" not in nearest:
        remedy += f"; --accept-changed {','.join(refused)} goes on all the same, and the journal will say so"
    raise CorpusError(
        f"{holder} holds vectors that were computed otherwise: {'; '.join(nearest.values())}. Vectors made "
        f"now would differ from them a little. {remedy}."
    )


def _installed(distribution: str) -> str | None:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return None
