"""Grafana dashboard of the front ends' counters and Triton's own metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["dashboard"]

_Panel = tuple[str, str, Sequence[tuple[str, str]]]

_PANELS: Sequence[_Panel] = (
    (
        "Requests per second",
        "reqps",
        [
            ("sum by (model) (rate(nv_inference_request_success[1m]))", "{{model}}"),
        ],
    ),
    (
        "Request latency",
        "µs",
        [
            (
                "sum by (model) (rate(nv_inference_request_duration_us[1m])) / "
                "sum by (model) (rate(nv_inference_request_success[1m]))",
                "{{model}}",
            ),
            (
                "sum by (model) (rate(nv_inference_queue_duration_us[1m])) / "
                "sum by (model) (rate(nv_inference_request_success[1m]))",
                "{{model}}: queue",
            ),
        ],
    ),
    (
        "Rows per batch",
        "short",
        [
            (
                "sum by (model) (rate(nv_inference_count[1m])) / "
                "sum by (model) (rate(nv_inference_exec_count[1m]))",
                "{{model}}",
            )
        ],
    ),
    (
        "Failed requests per second",
        "reqps",
        [
            ("sum by (model, reason) (rate(nv_inference_request_failure[1m]))", "{{model}} {{reason}}"),
            ("sum by (model, reason) (rate(babeltower_failed_requests_total[1m]))", "{{model}}: {{reason}}"),
        ],
    ),
    ("Waiting requests", "short", [("sum by (model) (nv_inference_pending_request_count)", "{{model}}")]),
    ("Tokens per second", "short", [("sum by (model) (rate(babeltower_tokens_total[1m]))", "{{model}}")]),
    (
        "Share of padding",
        "percentunit",
        [
            (
                "sum by (model) (rate(babeltower_padding_tokens_total[1m])) / "
                "(sum by (model) (rate(babeltower_tokens_total[1m])) + "
                "sum by (model) (rate(babeltower_padding_tokens_total[1m])))",
                "{{model}}",
            )
        ],
    ),
    (
        "Calls of the text tower by length",
        "ops",
        [("sum by (bucket) (rate(babeltower_tower_calls_total[1m]))", "{{bucket}} tokens")],
    ),
    (
        "Texts by language",
        "short",
        [("topk(12, sum by (language) (rate(babeltower_texts_by_language_total[5m])))", "{{language}}")],
    ),
    (
        "Share of truncated texts",
        "percentunit",
        [
            (
                "sum by (model) (rate(babeltower_truncated_texts_total[5m])) / "
                "sum by (model) (rate(babeltower_texts_total[5m]))",
                "{{model}}",
            )
        ],
    ),
    (
        "Images and decode failures",
        "ops",
        [
            ("sum by (model) (rate(babeltower_images_total[1m]))", "{{model}}"),
            ("sum by (model) (rate(babeltower_decode_failures_total[1m]))", "{{model}}: failed"),
        ],
    ),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's import format; Grafana asks for the data source."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "title": "babeltower",
        "uid": "babeltower",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": [
            {
                "id": i + 1,
                "type": "timeseries",
                "title": title,
                "datasource": source,
                "gridPos": {"x": 12 * (i % 2), "y": 8 * (i // 2), "w": 12, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + n), "expr": expression, "legendFormat": legend, "datasource": source}
                    for n, (expression, legend) in enumerate(queries)
                ],
            }
            for i, (title, unit, queries) in enumerate(_PANELS)
        ],
    }
