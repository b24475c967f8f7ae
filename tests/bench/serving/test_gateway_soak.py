"""What the soak of the gateway sends, and that its faults are seen."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import typer
from sample_models import Exported
from typer.testing import CliRunner

from bench.serving.gateway_soak import GatewaySoak, body_of_request
from bench.serving.gateway_soak import main as soak
from bench.timing.soak_requests import Request, bad_requests


def column(value: bytes) -> np.ndarray:
    return np.array([[value]], dtype=object)


def test_bodies_ask_what_requests_ask() -> None:
    text = Request("m_text", {"text": column("olá".encode()), "language": column(b"pt")}, "text")
    assert json.loads(body_of_request("m", text)) == {
        "model": "m", "encoding_format": "base64", "input": ["olá"], "language": ["pt"],
    }  # fmt: skip
    image = Request("m_image", {"image": column(b"\xff\xd8"), "dim": np.array([[7]], np.int32)}, "image")
    body = json.loads(body_of_request("m", image))
    assert base64.b64decode(body["input"][0]["image"]) == b"\xff\xd8"
    assert body["dimensions"] == 7


def test_every_bad_request_keeps_its_fault() -> None:
    bodies = {r.kind: body_of_request("m", r) for r in bad_requests("m", asks_language=True, image=b"x" * 64)}
    assert len(set(bodies.values())) == len(bodies) == 15
    with pytest.raises(UnicodeDecodeError):
        json.loads(bodies["text that is no UTF-8"])
    assert json.loads(bodies["text of wrong type"])["input"] == [1]
    assert json.loads(bodies["unknown input"])["texts"] == ["a"]


def test_wrong_answers_are_surprises() -> None:
    vector = np.array([1.0, 0.0], np.float32)
    good = Request("m_text", {}, "text", vector)
    bad = Request("m_text", {}, "empty text")

    def answer(found: np.ndarray) -> bytes:
        packed = base64.b64encode(found.astype("<f4").tobytes()).decode()
        return json.dumps({"data": [{"embedding": packed}]}).encode()

    refusal = json.dumps({"error": {"message": "it is empty"}}).encode()
    right = GatewaySoak()
    right.note(good, 200, answer(vector))
    right.note(bad, 400, refusal)
    assert right.is_right
    for request, status, said in (
        (good, 200, answer(vector + 1e-4)),
        (good, 400, refusal),
        (good, 503, b""),
        (bad, 200, answer(vector)),
        (bad, 500, refusal),
    ):
        wrong = GatewaySoak()
        wrong.note(request, status, said)
        assert not wrong.is_right
        assert len(wrong.surprises) == 1


def test_hundreds_of_requests_are_answered_right(exported: Exported) -> None:
    done = CliRunner().invoke(_app(), [str(exported("nllb-siglip-mrl")), "--requests=400", "--in-process"])
    assert done.exit_code == 0, done.output
    assert "20 bad refused of 400" in done.output.replace("\n", " ")


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(soak)
    return app
