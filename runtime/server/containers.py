"""Files and command to serve a repository in a container of a Triton release."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from runtime.backends.plans import VERSION_COMPATIBLE, PlanManifest
from runtime.errors import EngineError
from runtime.manifest import Engine, Precision, names_in_repository
from runtime.repository import manifests_of_repository
from runtime.server.alerts import alert_rules
from runtime.server.dashboard import dashboard
from runtime.server.devices import (
    TowerFolder,
    models_without_gpu,
    remarks_on_cpu_towers,
    towers_of_repository,
)
from runtime.triton_config import config_text_of_folder

__all__ = ["RELEASE", "deployment_from_repository"]

RELEASE = "26.10"
"""Triton release; its ONNX Runtime reads opset 18 and IR 10 (``docs/stock-backends.md``)."""

_FRONT_END_PACKAGES = ("tokenizers", "pillow", "ftfy", "simplejpeg", "pyvips", "pyvips-binary")
_EXPLICIT = "--model-control-mode=explicit"
_SHARED_MEMORY = "--allow-client-shm=true"
_PLAIN_YAML = re.compile(r"[\w./-][\w./=-]*", re.ASCII)
_PINNED_BYTES = 512 << 20
"""Pinned memory of the server, for the tensors of requests in flight; Triton's default is half of it."""


def deployment_from_repository(
    repository: Path,
    folder: Path | None,
    *,
    target: str,
    shared_memory: bool = False,
    control: bool = False,
) -> Iterator[str]:
    """Write the files of a container, its compose file, Kubernetes manifest, dashboard and alert rules.

    Args:
        folder: Output folder, created if missing; existing files are replaced. ``None`` writes nothing.
        target: ``gpu`` reserves a GPU, ``cpu`` does not.
        shared_memory: Allow clients on the server's machine to pass images in shared memory.
        control: Allow clients of the compose file's server, whose ports are on this machine only, to load and
            unload models.

    Yields:
        Lines on the written files, the command that starts the server, towers that stay on the CPU, and
        differences of its backends.

    Raises:
        EngineError: the repository has no model, or none for the target; or the folder cannot be written.
    """
    if not names_in_repository(repository):
        raise EngineError(f"{repository} holds no model. Pass the folder that `babeltower export` wrote to.")
    on_gpu = target == "gpu"
    arguments = [*_model_arguments(repository, on_gpu=on_gpu), *_tensorrt_arguments(repository)]
    if on_gpu:
        arguments.append(f"--pinned-memory-pool-byte-size={_PINNED_BYTES}")
    if shared_memory:
        arguments.append(_SHARED_MEMORY)
    texts = _texts(
        repository.resolve(), arguments, on_gpu=on_gpu, shared_memory=shared_memory, control=control
    )
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
    yield f"docker compose --project-directory {shlex.quote(str(folder))} up --build --wait"
    if shared_memory:
        yield (
            "shared memory: every client that reaches the server may map regions of this machine's /dev/shm; "
            "keep its ports on this machine"
        )
    if control:
        yield (
            "control: compose.yaml lets every client on this machine load models, which run code; "
            "kubernetes.yaml does not, since its ports are open to the cluster"
        )
    if on_gpu:
        yield from remarks_on_cpu_towers(repository)
    yield from _differences(repository)


def _model_arguments(repository: Path, *, on_gpu: bool) -> list[str]:
    models = None if on_gpu else models_without_gpu(repository)
    if models is None:
        return []
    return [_EXPLICIT, *(f"--load-model={model}" for model in models)]


def _tensorrt_arguments(repository: Path) -> list[str]:
    """Return the option that opens plans of other TensorRT versions, which runs code that they contain."""
    return [VERSION_COMPATIBLE] if any(plan.version_compatible for _, plan in _plans(repository)) else []


def _plans(repository: Path) -> Iterator[tuple[TowerFolder, PlanManifest]]:
    for tower in towers_of_repository(repository):
        if tower.engine is Engine.TENSORRT:
            for plan in sorted(tower.folder.glob("*/*.plan")):
                yield tower, PlanManifest.read(plan)


def _differences(repository: Path) -> Iterator[str]:
    """Yield what the container's own backends lack: settings of the served variants, versions of plans."""
    for tower, plan in _plans(repository):
        if not plan.version_compatible:
            yield (
                f"{tower.folder.name}: only a container with TensorRT {plan.compiler_version} opens its "
                f"plan, which is not version-compatible; look up the version of {RELEASE}, or export there"
            )
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


def _texts(
    repository: Path, arguments: Sequence[str], *, on_gpu: bool, shared_memory: bool, control: bool
) -> dict[str, str]:
    controlled = [*arguments]
    if control and not any(argument.startswith(_EXPLICIT) for argument in arguments):
        controlled += [_EXPLICIT, "--load-model=*"]  # those of a rollout too, when the server restarts
    values = {
        "release": RELEASE,
        "packages": " ".join(_pinned()),
        "repository": _quoted_for_compose(str(repository)),
        "compose_arguments": _listed(map(_quoted_for_compose, controlled), indent=6),
        "kubernetes_arguments": _listed(map(_quoted, arguments), indent=12),
        "kubernetes_gpu": ', nvidia.com/gpu: "1"' if on_gpu else "",
        "kubernetes_shared": _KUBERNETES_SHARED if shared_memory else "",
        "compose_memory": _COMPOSE_SHARED if shared_memory else _COMPOSE_PRIVATE,
        "compose_gpu": _COMPOSE_GPU if on_gpu else "",
    }
    templates = files("runtime.server") / "templates"
    texts = {
        name: Template((templates / name).read_text(encoding="utf-8")).substitute(values)
        for name in ("Dockerfile", "compose.yaml", "kubernetes.yaml")
    }
    scripts = {
        "readiness.py": files("runtime.server") / "readiness.py",
        "draining.py": files("runtime") / "draining.py",
    }
    return {
        **texts,
        **{name: script.read_text(encoding="utf-8") for name, script in scripts.items()},
        "alerts.yaml": alert_rules(),
        "dashboard.json": json.dumps(dashboard(), indent=2) + "\n",
    }


def _pinned() -> list[str]:
    lines = (files("runtime.server") / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in _FRONT_END_PACKAGES]


def _quoted(text: str) -> str:
    """Quote a text for YAML, if it needs quotes."""
    return text if _PLAIN_YAML.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _quoted_for_compose(text: str) -> str:
    """Quote a text for a compose file, which takes ``$`` for a variable."""
    return _quoted(text.replace("$", "$$"))


def _listed(arguments: Iterable[str], *, indent: int) -> str:
    return "".join(f"\n{' ' * indent}- {argument}" for argument in arguments)


_COMPOSE_PRIVATE = "    shm_size: 2gb               # tensors go to and from the Python models through it"
_COMPOSE_SHARED = "    ipc: host                   # clients on this machine pass images in its /dev/shm"
_KUBERNETES_SHARED = """
        # For shared memory, the client is a container of this pod: 127.0.0.1, with "shm" at /dev/shm."""

_COMPOSE_GPU = """
    deploy:
      resources:
        reservations:
          devices:
            - {driver: nvidia, count: 1, capabilities: [gpu]}"""
