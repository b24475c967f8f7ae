"""Rules and dashboard as Prometheus reads them: promtool, and a real scrape of a served repository."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import yaml
from altered_models import copied
from prometheus_server import Prometheus, programs_of_prometheus, running_prometheus
from raw_client import bytes_column, infer
from sample_models import Exported
from serving import Serving, wait_until
from tritonclient.utils import InferenceServerException

from runtime.server import ServerEnvironment
from runtime.server.alerts import ALERTS, QUEUE_TIME, Alert, alert_rules
from runtime.server.dashboard import dashboard
from samples.dataset import load_gallery
from triton_models.answers import REASONS

NAME = "nllb-clip"
TOKEN = "0123456789abcdef-of-the-tests"
QUIET, SOME, BUSY = "0x240", "0+15x240", "0+150x240"
"""Counters over an hour, a sample each quarter of a minute: none, one or ten a second."""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "alerts.yaml"
    path.write_text(alert_rules())
    return path


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [programs_of_prometheus() / "promtool", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing(rules: Path) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", rules)


def failed(model: str, reason: str, values: str) -> list[dict[str, str]]:
    """Requests that a front end failed, beside ten that it ran."""
    counts = {**dict.fromkeys(REASONS, QUIET), reason: values}
    return [
        *(series("babeltower_failed_requests_total", n, model=model, reason=r) for r, n in counts.items()),
        *requests(model, BUSY, QUIET),
    ]


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    given = {"instance": "a:8002", **labels}
    shown = ",".join(f'{key}="{value}"' for key, value in given.items())
    return {"series": f"{name}{{{shown}}}", "values": values}


def requests(model: str, success: str, failure: str) -> list[dict[str, str]]:
    return [
        series("nv_inference_request_success", success, model=model, version="1"),
        series("nv_inference_request_failure", failure, model=model, version="1", reason="OTHER"),
    ]


@dataclass(frozen=True)
class Case:
    """Series with which an alert fires, and what it says then; and series with which it does not fire."""

    firing: list[dict[str, str]]
    summary: str
    quiet: list[dict[str, str]]
    model: str = ""


TEXT, IMAGE = f"{NAME}_text", f"{NAME}_image"


def waiting(milliseconds: int) -> list[dict[str, str]]:
    """Ten requests a second that each waited so long."""
    queue = series("nv_inference_queue_duration_us", f"0+{150_000 * milliseconds}x240", model=TEXT)
    return [queue, *requests(TEXT, BUSY, QUIET)]


def decoded(failures: str) -> list[dict[str, str]]:
    images = series("babeltower_images_total", BUSY, model=IMAGE)
    return [images, series("babeltower_decode_failures_total", failures, model=IMAGE)]


PENDING = series("nv_inference_pending_request_count", "3x240", model=TEXT)
CASES = {
    "BabeltowerFailures": Case(
        failed(TEXT, "internal", SOME),
        f"{TEXT} on a:8002 fails 10% of requests",
        failed(TEXT, "input", BUSY),
        TEXT,
    ),
    "BabeltowerRefusals": Case(
        failed(IMAGE, "image", "0+45x240"),
        f"{IMAGE} on a:8002 refuses 30% of requests: a client sends what is not valid",
        failed(IMAGE, "image", SOME),
        IMAGE,
    ),
    "BabeltowerTowerFailures": Case(
        failed(TEXT, "tower", "0+1x240"),
        f"the tower of {TEXT} on a:8002 fails, or computes no finite vectors",
        failed(TEXT, "cancelled", BUSY),
        TEXT,
    ),
    "BabeltowerStuck": Case(
        [PENDING, *requests(TEXT, QUIET, QUIET)],
        f"{TEXT} on a:8002 has waiting requests and answers none",
        [PENDING, *requests(TEXT, SOME, QUIET)],
        TEXT,
    ),
    "BabeltowerQueue": Case(
        waiting(1_500), "requests to a:8002 wait 1.5k ms: add servers, or refuse earlier", waiting(900)
    ),
    "BabeltowerDecodeFailures": Case(
        decoded(BUSY), f"50% of the images sent to {IMAGE} cannot be decoded", decoded(SOME), IMAGE
    ),
    "BabeltowerAbsent": Case(
        [],
        "no server is scraped: all are down, or Prometheus does not find them",
        requests(TEXT, QUIET, QUIET),
    ),
}


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == {alert.name for alert in ALERTS}


@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_alerts_fire_when_they_should(name: str, fires: bool, rules: Path, tmp_path: Path) -> None:
    """Half an hour of series, evaluated by promtool."""
    case = CASES[name]
    (alert,) = [alert for alert in ALERTS if alert.name == name]
    labels = {"severity": alert.severity}
    if name != "BabeltowerAbsent":
        labels["instance"] = "a:8002"
    if case.model:
        labels["model"] = case.model
    expected = {"exp_labels": labels, "exp_annotations": {"summary": case.summary}}
    times = [{"eval_time": "30m", "alertname": name, "exp_alerts": [expected] if fires else []}]
    if fires:  # not at once: it is pending first
        times.append({"eval_time": f"{alert.minutes - 1}m", "alertname": name, "exp_alerts": []})
    file = tmp_path / "case.yaml"
    test = {"interval": "15s", "input_series": case.firing if fires else case.quiet, "alert_rule_test": times}
    file.write_text(
        yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "15s", "tests": [test]})
    )
    promtool("test", "rules", file)


@pytest.fixture(scope="module")
def scraped(
    exported: Exported, server_environment: ServerEnvironment, rules: Path, tmp_path_factory: Any
) -> Iterator[Prometheus]:
    """Prometheus beside ``babeltower serve`` under traffic, some of it bad, some of it more than fits."""
    model = copied(exported(NAME), tmp_path_factory.mktemp("scraped") / "models")
    folder = tmp_path_factory.mktemp("prometheus")
    token = folder / "token"
    token.write_text(TOKEN)
    arguments = ("--port=0", "--grpc-port=0", "--metrics-port=0", "--http-api", "--token-file", str(token))
    done = threading.Event()
    with Serving(model.parent, server_environment, *arguments) as serving:
        serving.wait_until_served()
        metrics = serving.address("metrics").removesuffix("/metrics").rpartition("/")[2]
        gateway = serving.address("http").rpartition("/")[2]
        authorization = {"credentials": TOKEN}
        targets = {
            "triton": {"static_configs": [{"targets": [metrics]}]},
            "gateway": {"static_configs": [{"targets": [gateway]}], "authorization": authorization},
        }
        traffic = threading.Thread(target=send, args=(serving.address("grpc"), done))
        traffic.start()
        try:
            with running_prometheus(targets, rules, folder) as prometheus:
                yield prometheus
        finally:
            done.set()
            traffic.join()


def send(address: str, done: threading.Event) -> None:
    """Send texts that are padded or truncated, images, and requests of both kinds that fail."""
    client = tritonclient.grpc.InferenceServerClient(address.removeprefix("grpc://"))
    headers = {"triton-grpc-protocol-authorization": f"Bearer {TOKEN}"}
    texts = bytes_column(["a cat", "a cat sat", "a " * 500])
    image = load_gallery()[0].png
    requests = [
        (TEXT, {"text": texts, "language": bytes_column(["en"] * 3)}),
        (TEXT, {"text": texts, "language": bytes_column(["xx-Nope"] * 3)}),
        (IMAGE, {"image": bytes_column([image])}),
        (IMAGE, {"image": bytes_column([b"no image"])}),
    ]
    while not done.is_set():
        for name, inputs in requests:
            with contextlib.suppress(InferenceServerException):
                infer(client, tritonclient.grpc, name, inputs, headers=headers)
        done.wait(0.05)


def test_both_doors_of_metrics_are_scraped(scraped: Prometheus) -> None:
    def up() -> dict[str, str]:
        return {found["metric"]["job"]: found["value"][1] for found in scraped.result("up")}

    wait_until(lambda: up() == {"triton": "1", "gateway": "1"}, f"both are up: {up()}")
    wait_until(lambda: scraped.result("rate(babeltower_gateway_requests_total[1m])"), "the gateway counts")


EXPRESSIONS = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("expression", [*EXPRESSIONS, QUEUE_TIME])
def test_every_expression_has_data(expression: str, scraped: Prometheus) -> None:
    """Numbers, not NaN, which a division by nothing gives."""
    wait_until(
        lambda: [found for found in scraped.result(expression) if found["value"][1] != "NaN"], expression
    )


@pytest.mark.parametrize("alert", [alert for alert in ALERTS if alert.name != "BabeltowerAbsent"], ids=str)
def test_what_alerts_look_at_has_data(alert: Alert, scraped: Prometheus) -> None:
    """Alerts themselves are empty until they fire; their left side is not."""
    wait_until(lambda: scraped.result(alert.value), alert.value)


def test_what_is_wrong_here_is_pending(scraped: Prometheus) -> None:
    """Half of the requests are refused; nothing else is wrong, and a server is there."""
    wrong = {"BabeltowerRefusals", "BabeltowerDecodeFailures"}

    def pending() -> set[str]:
        return {found["metric"]["alertname"] for found in scraped.result("ALERTS")}

    wait_until(lambda: pending() == wrong, f"the alerts are {wrong}: {pending()}")


def test_prometheus_evaluates_every_rule(scraped: Prometheus) -> None:
    (group,) = scraped.ask("rules")["groups"]
    wait_until(
        lambda: all(rule["health"] == "ok" for rule in scraped.ask("rules")["groups"][0]["rules"]),
        "every rule is evaluated",
    )
    assert len(group["rules"]) == len(ALERTS) + 1
