"""Files and command to serve a repository in a container of a Triton release."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template

from runtime.errors import EngineError
from runtime.manifest import Precision, names_in_repository
from runtime.repository import manifests_of_repository
from runtime.server.dashboard import dashboard
from runtime.triton_config import config_text_of_folder

__all__ = ["RELEASE", "deployment_from_repository"]

RELEASE = "26.06"
"""Triton release, with ONNX Runtime 1.24.4, which reads opset 18 and IR 10."""

_FRONT_END_PACKAGES = ("tokenizers", "pillow", "ftfy", "simplejpeg")
_ARGUMENT = "--backend-config=tensorrt,version-compatible=true"


def deployment_from_repository(repository: Path, folder: Path | None, *, target: str) -> Iterator[str]:
    """Write ``Dockerfile``, ``compose.yaml``, ``kubernetes.yaml`` and ``dashboard.json``.

    Args:
        folder: Output folder, created if missing; existing files are replaced. ``None`` writes nothing.
        target: ``gpu`` reserves a GPU, ``cpu`` does not.

    Yields:
        Lines on the written files, the command that starts the server, and differences of its backends.

    Raises:
        EngineError: the repository has no model, or the folder cannot be written.
    """
    if not names_in_repository(repository):
        raise EngineError(f"{repository} holds no model. Pass the folder that `babeltower export` wrote to.")
    texts = _texts(repository.resolve(), target)
    if folder is None:
        yield "# compose.yaml; --write FOLDER saves it with a Kubernetes manifest and a dashboard"
        yield texts["compose.yaml"]
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            yield f"wrote {folder / name}"
    except OSError as error:
        raise EngineError(f"{folder} cannot be written: {error.strerror}.") from error
    yield f"docker compose --project-directory {folder} up --build --wait"
    yield from _differences(repository)


def _differences(repository: Path) -> Iterator[str]:
    """Yield the settings that the container's own backends lack, for the served variants."""
    for manifest in manifests_of_repository(repository):
        for served in manifest.front_ends:
            variant = manifest.variants[served.variant]
            config = config_text_of_folder(repository / variant.text.model)
            on_openvino = 'backend: "openvino"' in config
            if on_openvino and variant.precision is not Precision.BF16:
                yield (
                    f"{manifest.name} {served.variant}: the container's OpenVINO computes unquantized nodes "
                    "in BF16 if the processor supports it, and has no option to change this "
                    "(docs/stock-backends.md)"
                )


def _texts(repository: Path, target: str) -> dict[str, str]:
    gpu = target == "gpu"
    values = {
        "release": RELEASE,
        "packages": " ".join(_pinned()),
        "repository": str(repository),
        "backend_arguments": f"      - {_ARGUMENT}",
        "kubernetes_backend_arguments": f"            - {_ARGUMENT}",
        "kubernetes_gpu": ', nvidia.com/gpu: "1"' if gpu else "",
        "compose_gpu": _COMPOSE_GPU if gpu else "",
    }
    templates = files("runtime.server") / "templates"
    texts = {
        name: Template((templates / name).read_text(encoding="utf-8")).substitute(values)
        for name in ("Dockerfile", "compose.yaml", "kubernetes.yaml")
    }
    return {**texts, "dashboard.json": json.dumps(dashboard(), indent=2) + "\n"}


def _pinned() -> list[str]:
    lines = (files("runtime.server") / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in _FRONT_END_PACKAGES]


_COMPOSE_GPU = """\
    deploy:
      resources:
        reservations:
          devices:
            - {driver: nvidia, count: 1, capabilities: [gpu]}"""
