"""Prometheus rules: the autoscaler's queue time, and alerts on servers that fail their clients."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["ALERTS", "QUEUE_TIME", "Alert", "alert_rules", "expressions_of_alerts"]

QUEUE_TIME = "babeltower_queue_ms"
"""Recorded metric: mean time that a request waited in the last minute, by server, in ms."""

_QUEUE_TIME = (
    "sum by (instance, namespace, pod) (rate(nv_inference_queue_duration_us[1m])) / 1000 / "
    "sum by (instance, namespace, pod) (rate(nv_inference_request_success[1m]) > 0)"
)


@dataclass(frozen=True, slots=True)
class Alert:
    """Alert: fires while ``value`` compares with its limit for the given minutes.

    Attributes:
        value: PromQL of the observed value; it has data whether or not the alert fires.
        fires: Comparison and limit.
    """

    name: str
    value: str
    fires: str
    minutes: int
    severity: str
    summary: str

    @property
    def expression(self) -> str:
        """PromQL of the alert."""
        return f"{self.value} {self.fires}"


_FRONT_ENDS = 'model=~".+_(text|image)"'


def _failed(reasons: str, minutes: int) -> str:
    """PromQL of the requests a second that a front end failed, by reasons of ``triton_models.answers``.

    Triton counts a request that a Python model answers with an error among the successes.
    """
    return (
        "sum by (instance, model) "
        f'(rate(babeltower_failed_requests_total{{reason=~"{reasons}"}}[{minutes}m]))'
    )


def _not_run(minutes: int) -> str:
    """PromQL of the requests a second that Triton failed before a front end saw them."""
    return f"sum by (instance, model) (rate(nv_inference_request_failure{{{_FRONT_ENDS}}}[{minutes}m]))"


def _run(minutes: int) -> str:
    return f"sum by (instance, model) (rate(nv_inference_request_success{{{_FRONT_ENDS}}}[{minutes}m]))"


ALERTS: Sequence[Alert] = (
    Alert(
        "BabeltowerFailures",
        f"({_failed('tower|internal', 5)} + {_not_run(5)}) / ({_run(5)} + {_not_run(5)})",
        "> 0.05",
        5,
        "page",
        "{{ $labels.model }} on {{ $labels.instance }} fails {{ $value | humanizePercentage }} of requests",
    ),
    Alert(
        "BabeltowerTowerFailures",
        _failed("tower", 5),
        "> 0",
        2,
        "page",
        "the tower of {{ $labels.model }} on {{ $labels.instance }} fails, or computes no finite vectors",
    ),
    Alert(
        "BabeltowerRefusals",
        f"{_failed('input|language|image', 15)} / {_run(15)}",
        "> 0.2",
        15,
        "ticket",
        "{{ $labels.model }} on {{ $labels.instance }} refuses {{ $value | humanizePercentage }} of "
        "requests: a client sends what is not valid",
    ),
    Alert(
        "BabeltowerStuck",
        "sum by (instance, model) (nv_inference_pending_request_count)",
        "> 0 unless sum by (instance, model) (rate(nv_inference_request_success[2m]) > 0)",
        2,
        "page",
        "{{ $labels.model }} on {{ $labels.instance }} has waiting requests and answers none",
    ),
    Alert(
        "BabeltowerQueue",
        _QUEUE_TIME,
        "> 1000",
        5,
        "ticket",
        "requests to {{ $labels.instance }} wait {{ $value | humanize }} ms: add servers, or refuse earlier",
    ),
    Alert(
        "BabeltowerDecodeFailures",
        "sum by (instance, model) (rate(babeltower_decode_failures_total[15m])) / "
        "(sum by (instance, model) (rate(babeltower_images_total[15m])) + "
        "sum by (instance, model) (rate(babeltower_decode_failures_total[15m])))",
        "> 0.2",
        15,
        "ticket",
        "{{ $value | humanizePercentage }} of the images sent to {{ $labels.model }} cannot be decoded",
    ),
    Alert(
        "BabeltowerAbsent",
        "absent(nv_inference_request_success)",
        "== 1",
        2,
        "page",
        "no server is scraped: all are down, or Prometheus does not find them",
    ),
)
"""Alerts of the rules file."""


def expressions_of_alerts() -> list[str]:
    """Return every PromQL expression of the rules."""
    return [_QUEUE_TIME, *(alert.expression for alert in ALERTS)]


def alert_rules() -> str:
    """Return the rules as a file for Prometheus (``rule_files``)."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Rules for Prometheus: list this file under rule_files."
    yield "groups:"
    yield "  - name: babeltower"
    yield "    rules:"
    yield f"      - record: {QUEUE_TIME}"
    yield "        expr: >-"
    yield from _folded(_QUEUE_TIME, indent=10)
    for alert in ALERTS:
        yield f"      - alert: {alert.name}"
        yield "        expr: >-"
        yield from _folded(alert.expression, indent=10)
        yield f"        for: {alert.minutes}m"
        yield f"        labels: {{severity: {alert.severity}}}"
        yield "        annotations:"
        yield "          summary: >-"
        yield from _folded(alert.summary, indent=12)


def _folded(text: str, *, indent: int) -> list[str]:
    """Wrap a text at its spaces, for a folded block of YAML."""
    margin = " " * indent
    return textwrap.wrap(
        text,
        100,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
