"""Files for containers, and towers that need a GPU or stay beside it."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml
from gpu_repository import repository_for_cuda
from sample_models import Exported
from typer.testing import CliRunner
from yamllint import linter
from yamllint.config import YamlLintConfig

from export.triton.frontends import frontends_from_model
from runtime.backends.plans import KernelSummary, PlanManifest
from runtime.commands.app import app
from runtime.errors import EngineError
from runtime.manifest import Engine, Manifest, Precision, manifest_path
from runtime.server import ServerEnvironment, ServerOptions, running_server
from runtime.server.alerts import QUEUE_TIME, expressions_of_alerts
from runtime.server.containers import RELEASE, deployment_from_repository
from runtime.server.devices import models_without_gpu, require_no_gpu, towers_of_repository
from runtime.storage import sha256_of_file

PINNED = "--pinned-memory-pool-byte-size=536870912"
ANY_TENSORRT = "--backend-config=tensorrt,version-compatible=true"


def kubernetes_objects(folder: Path) -> dict[str, dict[str, Any]]:
    """Objects of the written manifest, by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((folder / "kubernetes.yaml").read_text())}


def containers(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[str], list[str]]:
    """The compose service, the Kubernetes pod, and the server's arguments in both."""
    service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["triton"]
    deployment = kubernetes_objects(folder)["Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    return service, pod, service["command"], pod["containers"][0]["args"]


def add_plan(model: Path, *, version_compatible: bool) -> None:
    """Turn the variant for CUDA into one for TensorRT: the configuration's backend, and a plan's manifest."""
    manifest = Manifest.read(model)
    variant = manifest.variants["fp16_cuda"]
    for tower in (variant.text, variant.image):
        config = model.parent / tower.model / "config.pbtxt"
        config.write_text(config.read_text().replace('backend: "onnxruntime"', 'backend: "tensorrt"'))
        plan = config.parent / "1" / "model.plan"
        plan.write_bytes(b"a plan")
        PlanManifest(
            "tensorrt", "11.4.0", "13.0", "A GPU", "9.0", "none", version_compatible, "fp16", (), {}, {},
            KernelSummary(1, {}, 0, ()), sha256_of_file(plan), 6, "model.onnx", "",
        ).write(plan)  # fmt: skip
    written = dataclasses.replace(variant, engines=(Engine.TENSORRT.value,))
    variants = {**manifest.variants, "fp16_cuda": written}
    manifest_path(model).write_text(dataclasses.replace(manifest, variants=variants).to_json())


@pytest.fixture
def both(exported: Exported, tmp_path: Path) -> Path:
    """A model with variants for the CPU and for CUDA; its front ends serve the former."""
    return repository_for_cuda(exported("capivara"), tmp_path / "r")


def test_the_container_files_are_whole(exported: Exported, tmp_path: Path) -> None:
    repository = exported("capivara").parent
    arguments = ["serve", str(repository), "--target", "gpu", "--write", str(tmp_path / "d")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"docker compose --project-directory {tmp_path / 'd'} up" in result.stdout
    service = yaml.safe_load((tmp_path / "d" / "compose.yaml").read_text())["services"]["triton"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    mount = {"type": "bind", "source": str(repository.resolve()), "target": "/models", "read_only": True}
    assert mount in service["volumes"]
    deployment = kubernetes_objects(tmp_path / "d")["Deployment"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    assert "tokenizers==" in (tmp_path / "d" / "Dockerfile").read_text()
    assert PINNED in service["command"]
    assert PINNED in container["args"]
    assert f"tritonserver:{RELEASE}-py3" in (tmp_path / "d" / "Dockerfile").read_text()
    assert service["image"] == container["image"] == f"babeltower-triton:{RELEASE}"
    panels = json.loads((tmp_path / "d" / "dashboard.json").read_text())["panels"]
    assert len(panels) >= 8
    assert "BF16" not in result.stdout


def test_any_path_is_mounted_and_printed_as_it_is(exported: Exported, tmp_path: Path) -> None:
    """Compose takes a colon for a separator of volumes, and a dollar for a variable."""
    repository, folder = tmp_path / 'my mödels:v1 $HOME ${x} "q" #', tmp_path / "out $put"
    shutil.copytree(exported("capivara").parent, repository)
    lines = list(deployment_from_repository(repository, folder, target="cpu"))
    service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["triton"]
    assert service["volumes"][0]["source"].replace("$$", "$") == str(repository)
    assert service["volumes"][0]["source"].count("$$") == 2
    (command,) = [line for line in lines if line.startswith("docker compose")]
    assert str(folder) in shlex.split(command)


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def written(
    request: pytest.FixtureRequest, exported: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the files for a target, with everything that an option adds."""
    folder = tmp_path_factory.mktemp("written")
    repository = exported("capivara").parent
    list(
        deployment_from_repository(repository, folder, target=request.param, shared_memory=True, control=True)
    )
    return folder


def test_kubernetes_objects_fit_their_schemas(written: Path) -> None:
    found = kubernetes_objects(written)
    assert set(found) == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    for data in found.values():
        kubernetes_validate.validate(data, desired_version="1.31", strict=True)


def test_written_yaml_is_clean(written: Path) -> None:
    config = YamlLintConfig("{extends: default, rules: {document-start: disable, line-length: {max: 120}}}")
    for name in ("compose.yaml", "kubernetes.yaml", "alerts.yaml"):
        problems = list(linter.run((written / name).read_text(), config))
        assert not problems, name


def test_pods_run_without_rights_and_are_probed_truly(written: Path) -> None:
    service, pod, composed, _ = containers(written)
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert service["read_only"]
    assert service["user"] == "1000:1000"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"][1] == "/opt/babeltower/readiness.py"
    assert "/opt/babeltower/readiness.py" in service["healthcheck"]["test"]
    assert "/opt/babeltower/draining.py" in container["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert service["pre_stop"][0]["command"][-1] == "/opt/babeltower/draining.py"
    assert "COPY readiness.py draining.py /opt/babeltower/" in (written / "Dockerfile").read_text()
    assert "--model-control-mode=explicit" in composed


def test_hadolint_finds_nothing(written: Path) -> None:
    """The base image is a release of NVIDIA's, which is its tag; pip's packages are pinned."""
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, written / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("script", ["readiness.py", "draining.py"])
def test_the_scripts_run_by_themselves(script: str, written: Path) -> None:
    """With nothing but the standard library, as in a container."""
    shown = subprocess.run(
        [sys.executable, "-I", "-S", str(written / script), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage" in shown.stdout


def test_alert_rules_are_what_prometheus_reads(written: Path) -> None:
    """Parsed with the grammar of PromQL; what promtool says of them: test_prometheus.py."""
    (group,) = yaml.safe_load((written / "alerts.yaml").read_text())["groups"]
    recorded, *alerts = group["rules"]
    metric = kubernetes_objects(written)["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]
    assert recorded["record"] == metric["name"] == QUEUE_TIME
    assert len({alert["alert"] for alert in alerts}) == len(alerts) >= 5
    for rule in group["rules"]:
        promql_parser.parse(rule["expr"])
    assert [rule["expr"] for rule in group["rules"]] == expressions_of_alerts()
    for alert in alerts:
        assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+m", alert["for"])


def test_what_a_container_computes_otherwise_is_said(exported: Exported, tmp_path: Path) -> None:
    source = exported("capivara")
    manifest = Manifest.read(source)
    folder = tmp_path / manifest.variant(Precision.FP32).text.model
    folder.mkdir()
    (folder / "config.pbtxt").write_text('backend: "openvino"\n')
    (tmp_path / "capivara.babeltower.json").write_text(manifest.to_json())
    lines = list(deployment_from_repository(tmp_path, tmp_path / "d", target="cpu"))
    assert lines[-1].startswith("capivara fp32: the container's OpenVINO computes")


def test_the_release_is_current() -> None:
    """Older ones starve requests in the batcher (before 26.08) and run cancelled ones (before 26.10)."""
    assert tuple(map(int, RELEASE.split("."))) >= (26, 10)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_shared_memory_works_in_both_files_when_asked_for(
    target: str, exported: Exported, tmp_path: Path
) -> None:
    repository = exported("capivara").parent
    arguments = ["serve", str(repository), "--target", target, "--shared-memory", "--write", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "may map regions of this machine's /dev/shm" in result.stdout
    service, pod, composed, arranged = containers(tmp_path)
    assert "--allow-client-shm=true" in composed
    assert "--allow-client-shm=true" in arranged
    assert service["ipc"] == "host"
    assert "shm_size" not in service
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    assert 'with "shm" at /dev/shm' in (tmp_path / "kubernetes.yaml").read_text()
    list(deployment_from_repository(repository, tmp_path, target=target))
    service, pod, composed, arranged = containers(tmp_path)
    assert "--allow-client-shm=true" not in [*composed, *arranged]
    assert "ipc" not in service
    assert service["shm_size"] == "2gb"


def test_towers_that_stay_on_the_cpu_are_named_with_the_remedy(both: Path, tmp_path: Path) -> None:
    repository = both.parent
    lines = list(deployment_from_repository(repository, tmp_path / "d", target="gpu"))
    (line,) = [line for line in lines if "stay on the CPU" in line]
    assert line == (
        "capivara: the towers of fp32 stay on the CPU, where they were measured. To serve one on the GPU: "
        f"babeltower frontends {both} --variant fp16_cuda"
    )
    frontends_from_model(both, variant="fp16_cuda")
    lines = list(deployment_from_repository(repository, tmp_path / "d", target="gpu"))
    (line,) = [line for line in lines if "stay on the CPU" in line]
    assert line.endswith("Its front ends serve fp16_cuda on the GPU.")
    assert "--load-model" not in (tmp_path / "d" / "compose.yaml").read_text()


def test_a_model_without_a_gpu_variant_is_told_how_to_get_one(exported: Exported, tmp_path: Path) -> None:
    model = exported("capivara")
    lines = list(deployment_from_repository(model.parent, tmp_path, target="gpu"))
    (line,) = [line for line in lines if line.startswith("capivara: the towers of")]
    assert (
        f"babeltower export CHECKPOINT {model.parent} --name capivara --precision fp16 --engine cuda && "
        f"babeltower frontends {model} --variant fp16_cuda"
    ) in line


@pytest.mark.parametrize("version_compatible", [True, False])
def test_plans_of_other_versions_are_opened_only_if_they_can_be(
    both: Path, version_compatible: bool, tmp_path: Path
) -> None:
    add_plan(both, version_compatible=version_compatible)
    assert {tower.engine for tower in towers_of_repository(both.parent)} == {
        Engine.ONNXRUNTIME,
        Engine.TENSORRT,
    }
    lines = list(deployment_from_repository(both.parent, tmp_path / "d", target="gpu"))
    _, _, composed, arranged = containers(tmp_path / "d")
    assert (ANY_TENSORRT in composed) is (ANY_TENSORRT in arranged) is version_compatible
    remarks = [line for line in lines if "only a container with TensorRT 11.4.0 opens its plan" in line]
    assert len(remarks) == (0 if version_compatible else 2)


def test_no_plan_needs_no_option_for_plans(exported: Exported, tmp_path: Path) -> None:
    list(deployment_from_repository(exported("capivara").parent, tmp_path, target="gpu"))
    assert "tensorrt" not in (tmp_path / "compose.yaml").read_text()


def test_a_container_without_a_gpu_loads_what_it_can(both: Path, tmp_path: Path) -> None:
    list(deployment_from_repository(both.parent, tmp_path / "d", target="cpu"))
    _, _, composed, arranged = containers(tmp_path / "d")
    for arguments in (composed, arranged):
        loaded = [argument for argument in arguments if argument.startswith("--load-model=")]
        assert "--load-model=capivara_text" in loaded
        assert "--load-model=capivara_image_tower_fp32" in loaded
        assert not [argument for argument in loaded if "cuda" in argument]
        assert "--model-control-mode=explicit" in arguments


def test_serve_without_a_gpu_refuses_front_ends_of_one(both: Path, tmp_path: Path) -> None:
    frontends_from_model(both, variant="fp16_cuda")
    result = CliRunner().invoke(app, ["serve", str(both.parent), "--env", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.output.strip() == (
        "error: fp16_cuda, which the front ends of capivara serve, runs on an NVIDIA GPU, and this server "
        f"has none. Serve a variant for the CPU: babeltower frontends {both} --variant fp32; or run it in a "
        f"container: babeltower serve {both.parent} --target gpu --write FOLDER"
    )
    assert not (tmp_path / "none").exists()


def test_serve_without_a_gpu_refuses_a_repository_for_gpus_only(exported: Exported, tmp_path: Path) -> None:
    model = repository_for_cuda(exported("capivara"), tmp_path / "r", only=True)
    expected = (
        r"Every variant in .*r \(fp16_cuda\) runs on an NVIDIA GPU, and this server has none\. Export a "
        r"variant for the CPU: babeltower export CHECKPOINT .*--precision fp32 --engine onnxruntime; or run "
    )
    with pytest.raises(EngineError, match=expected):
        models_without_gpu(model.parent)
    with pytest.raises(EngineError, match="capivara_text_tower_fp16_cuda runs on an NVIDIA GPU"):
        require_no_gpu(model.parent, None)


def test_a_server_without_a_gpu_serves_the_rest(both: Path, server_environment: ServerEnvironment) -> None:
    with (
        pytest.raises(EngineError, match="capivara_text_tower_fp16_cuda runs on an NVIDIA GPU"),
        running_server(both.parent, environment=server_environment),
    ):
        pass
    models = models_without_gpu(both.parent)
    assert models is not None
    options = ServerOptions(models=models)
    with running_server(both.parent, environment=server_environment, options=options) as server:
        ready = {model["name"] for model in server.models() if model.get("state") == "READY"}
    assert ready == {
        "capivara_text",
        "capivara_image",
        "capivara_text_tower_fp32",
        "capivara_image_tower_fp32",
    }
