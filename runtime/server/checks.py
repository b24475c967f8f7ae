"""Checks of a server: its files before the start, and its answers to the opening probes when ready."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.plan_checks import require_plan_of_tower
from runtime.errors import EngineError, OpeningCheckError
from runtime.logs import LOGGER
from runtime.manifest import Engine, Manifest, Modality, Variant, verify_file
from runtime.opening.model_check import has_opening_file, probes_of_tower, require_same_space
from runtime.opening.probes import OpeningProbes
from runtime.opening.tower_check import (
    cosines_of_rows,
    message_of_shortfall,
    others_in_words,
    worst_shortfall,
)
from runtime.remote.tensors import bytes_from_tensor
from runtime.repository import manifests_of_repository
from runtime.server.loopback import opened
from runtime.triton_config import engine_of_tower

__all__ = ["require_right_answers", "verify_files_of_manifest", "verify_served_files"]

_ANSWER_S = 300.0
_TRIES, _PAUSE_S = 3, 0.5
_HEADER = "Inference-Header-Content-Length"
_DATATYPES = {"int64": "INT64", "uint8": "UINT8", "object": "BYTES"}


def verify_served_files(repository: Path, models: Collection[str] | None) -> None:
    """Verify the checksum of every file of the towers and front ends that a server will load.

    Args:
        models: Triton models to be loaded; ``None`` for all of the repository.

    Raises:
        ManifestError: a file is missing, truncated or changed.
        EngineError: a plan was built from another graph.
    """
    for manifest in manifests_of_repository(repository):
        verify_files_of_manifest(repository, manifest, models)


def verify_files_of_manifest(repository: Path, manifest: Manifest, models: Collection[str] | None) -> None:
    """Verify the files of one model; arguments and errors as of ``verify_served_files``."""
    for variant in manifest.variants.values():
        for modality in Modality:
            tower = variant.tower(modality)
            if _is_loaded(tower.model, models) and (repository / tower.model).is_dir():
                for record in tower.files:
                    verify_file(repository, record)
                if engine_of_tower(repository, tower) is Engine.TENSORRT:
                    require_plan_of_tower(repository, tower)
                if has_opening_file(tower):
                    probes = probes_of_tower(repository, manifest, variant, modality)
                    if probes is not None:
                        require_same_space(repository, manifest, variant, modality, probes)
    for front_ends in manifest.front_ends:
        for record in front_ends.files:
            if _is_loaded(record.path.partition("/")[0], models):
                verify_file(repository, record)


def _is_loaded(model: str, models: Collection[str] | None) -> bool:
    return models is None or model in models


def require_right_answers(
    url: str,
    repository: Path,
    loaded: Collection[str],
    *,
    names: Collection[str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Check a server with the opening probes: front ends by strings and images, other towers by tensors.

    A tower's vectors must match PyTorch's on every backend, including Triton's own.

    Args:
        url: URL of the HTTP endpoint.
        loaded: Names of the Triton models that are ready.
        names: Models to ask; ``None`` for all of the repository.
        headers: Headers of every request.

    Raises:
        OpeningCheckError: a vector is farther from PyTorch's than the export's figures allow.
        EngineError: a probe gets no answer.
        ManifestError: probes are missing or damaged.
    """
    server = _Asked(url, headers or {})
    for manifest in manifests_of_repository(repository, names):
        for key, variant in manifest.variants.items():
            for modality in Modality:
                tower = variant.tower(modality)
                if tower.model not in loaded:
                    continue
                probes = probes_of_tower(repository, manifest, variant, modality)
                if probes is None:
                    continue
                front = _front_end_of(manifest, key, modality)
                if front in loaded:
                    found = _asked_front_end(server, front, probes, tower.outputs[str(manifest.dim)])
                else:
                    front, found = tower.model, _asked_tower(server, tower.model, probes)
                _require(front, found, probes, manifest, variant, engine_of_tower(repository, tower))


def _front_end_of(manifest: Manifest, key: str, modality: Modality) -> str:
    """Return the front end of a variant's tower; empty if there is none."""
    for served in manifest.front_ends:
        if served.variant == key:
            return served.text if modality is Modality.TEXT else served.image
    return ""


def _require(
    model: str,
    found: Mapping[str, NDArray[Any]],
    probes: OpeningProbes,
    manifest: Manifest,
    variant: Variant,
    engine: Engine,
) -> None:
    cosines = {name: cosines_of_rows(rows, probes.vectors[name], name) for name, rows in found.items()}
    worst = worst_shortfall(cosines, probes, engine=engine.value, precision=variant.precision)
    if worst is None:
        return
    message = message_of_shortfall(
        worst,
        probes,
        tower=f"The server's {model}",
        computed=f"its {engine.value} backend in {variant.precision.value}",
        engine=engine,
        precision=variant.precision,
        others=f"{others_in_words(manifest, engine, variant.precision)} (`babeltower frontends --variant`)",
    )
    raise OpeningCheckError(
        message, tower=model, probe=worst.probe, cosine=worst.found, required=worst.required
    )


def _asked_tower(server: _Asked, model: str, probes: OpeningProbes) -> dict[str, NDArray[Any]]:
    names = list(probes.vectors)
    parts = [server.inferred(model, run, names) for run in probes.runs]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _asked_front_end(
    server: _Asked, model: str, probes: OpeningProbes, output: str
) -> dict[str, NDArray[Any]]:
    """Send one request per row; ``output`` is the tower's output name for the front end's full width."""
    rows: list[dict[str, bytes]]
    if probes.modality is Modality.IMAGE:
        rows = [{"image": image} for image in probes.images]
    else:
        pairs = zip(probes.texts, probes.languages, strict=True)
        rows = [{"text": text.encode(), "language": language.encode()} for text, language in pairs]
    answers = [
        server.inferred(model, {name: _bytes_tensor(value) for name, value in row.items()}, ["vector"])
        for row in rows
    ]
    return {output: np.concatenate([answer["vector"] for answer in answers])}


def _bytes_tensor(value: bytes) -> NDArray[Any]:
    tensor = np.empty((1, 1), dtype=np.object_)
    tensor[0, 0] = value
    return tensor


@dataclass(frozen=True, slots=True)
class _Asked:
    """HTTP endpoint of a server."""

    url: str
    headers: Mapping[str, str]

    def inferred(
        self, model: str, inputs: Mapping[str, NDArray[Any]], outputs: Collection[str]
    ) -> dict[str, NDArray[Any]]:
        """Send one request in KServe v2's binary format.

        An answer without tensors, which Triton rarely gives while it starts, says nothing of the model: the
        request is repeated, and the log says so.
        """
        contents = [
            bytes_from_tensor(a) if a.dtype == np.object_ else np.ascontiguousarray(a).tobytes()
            for a in inputs.values()
        ]
        said = {
            "inputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": _DATATYPES[array.dtype.name],
                    "parameters": {"binary_data_size": len(content)},
                }
                for (name, array), content in zip(inputs.items(), contents, strict=True)
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
        }
        head = json.dumps(said).encode()
        request = urllib.request.Request(
            f"{self.url}/v2/models/{model}/infer",
            data=b"".join([head, *contents]),
            headers={
                _HEADER: str(len(head)),
                "Content-Type": "application/octet-stream",
                **self.headers,
            },
        )
        try:
            for n_left in reversed(range(_TRIES)):
                with opened(request, timeout=_ANSWER_S) as answer:
                    body, n_head = answer.read(), answer.headers[_HEADER]
                if n_head is not None:
                    return _tensors(body, int(n_head))
                came = f"HTTP {answer.status} without tensors: {body[:300]!r}"
                if n_left:
                    LOGGER.warning("%s answered an opening probe by %s; it is asked again", model, came)
                    time.sleep(_PAUSE_S)
            raise ValueError(came)
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            raise EngineError(f"{model} does not answer its opening probes: {reason}") from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError, HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise EngineError(f"{model} does not answer its opening probes: {reason}.") from error


def _tensors(body: bytes, head_bytes: int) -> dict[str, NDArray[Any]]:
    found, start = {}, head_bytes
    for output in json.loads(body[:head_bytes])["outputs"]:
        size = int(output["parameters"]["binary_data_size"])
        if output["datatype"] != "FP32":
            raise ValueError(f"its {output['name']} is {output['datatype']}; expected FP32")
        array = np.frombuffer(body[start : start + size], np.dtype("<f4"))
        found[output["name"]], start = array.reshape(output["shape"]), start + size
    return found
