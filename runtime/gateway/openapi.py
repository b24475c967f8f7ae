"""Description of the gateway's interface in OpenAPI's format, and a page of it without scripts."""

from __future__ import annotations

import html
import json
from typing import Any

from runtime.gateway.inputs import EmbeddingRequest

__all__ = ["openapi_document", "openapi_page"]

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_EMBEDDINGS = {
    "type": "object",
    "properties": {
        "object": {"const": "list"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "object": {"const": "embedding"},
                    "index": {"type": "integer"},
                    "embedding": {
                        "anyOf": [
                            {"type": "array", "items": {"type": "number"}},
                            {"type": "string", "description": "base64 of float32, little-endian"},
                        ]
                    },
                },
            },
        },
        "model": {"type": "string"},
        "usage": {"type": "object", "description": "Always 0: tokens are counted in the metrics"},
    },
}
_MODEL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "dimensions": {"type": "array", "items": {"type": "integer"}},
        "fingerprint": {"type": "string"},
    },
}
_REFUSALS = {
    "400": "An input, a field or the JSON is not valid",
    "401": "The token is missing or wrong",
    "404": "There is no such model",
    "413": "The body is too large",
    "503": "The model is not available, or too much is waiting; try again later",
}


def openapi_document(*, version: str, has_token: bool) -> dict[str, Any]:
    """Return the document."""
    models = {"type": "object", "properties": {"data": {"type": "array", "items": _MODEL}}}
    security: dict[str, Any] = {"security": [{"token": []}]} if has_token else {}
    schemes = {"token": {"type": "http", "scheme": "bearer"}} if has_token else {}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "babeltower",
            "version": version,
            "description": "Unit vectors of texts in many languages, and of images, in one space",
        },
        "paths": {
            "/v1/embeddings": {
                "post": {
                    "summary": "Embed texts and images",
                    "requestBody": {"required": True, "content": _json(EmbeddingRequest.model_json_schema())},
                    "responses": _responses("The vectors, in the order of the inputs", _EMBEDDINGS),
                    **security,
                }
            },
            "/v1/models": {
                "get": {
                    "summary": "List the models",
                    "responses": _responses("The models", models),
                    **security,
                }
            },
            "/v1/models/{name}": {
                "get": {
                    "summary": "Describe a model",
                    "parameters": [name],
                    "responses": _responses("The model", _MODEL),
                    **security,
                }
            },
            "/health": {"get": {"summary": "Tell whether the gateway runs", "responses": _plain("It runs")}},
            "/metrics": {
                "get": {"summary": "Counters for Prometheus", "responses": _plain("Counters"), **security}
            },
        },
        "components": {"securitySchemes": schemes},
    }


def openapi_page(document: dict[str, Any]) -> str:
    """Render the document as HTML."""
    parts = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(
                f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation['summary'])}</p>"
            )
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                parts.append(f"<pre>{html.escape(json.dumps(schema, indent=2))}</pre>")
            rows = "".join(
                f"<tr><td>{status}<td>{html.escape(response['description'])}"
                for status, response in operation["responses"].items()
            )
            parts.append(f"<table>{rows}</table>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>babeltower</title>"
        "<style>body{font:16px/1.5 system-ui;max-width:50rem;margin:2rem auto;padding:0 1rem}"
        "pre{background:#f4f4f4;padding:1rem;overflow:auto;font-size:13px}td{padding-right:1rem}</style>"
        f"<h1>babeltower</h1><p>{html.escape(document['info']['description'])}. As JSON: "
        f"<a href=openapi.json>openapi.json</a></p>{''.join(parts)}</html>"
    )


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _responses(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    refusals = {status: {"description": said, "content": _json(_ERROR)} for status, said in _REFUSALS.items()}
    return {"200": {"description": description, "content": _json(schema)}, **refusals}


def _plain(description: str) -> dict[str, Any]:
    return {"200": {"description": description}}
