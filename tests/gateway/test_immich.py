"""The gateway in place of immich's machine-learning service: its requests, answers, refusals and memory."""

from __future__ import annotations

import dataclasses
import email.parser
import email.policy
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
import typer
import yaml
from gateways import TOKEN, Gateway, gateway_of_process, gateway_of_server
from PIL import Image
from sample_models import NAMES, ROOT, Exported
from typer.testing import CliRunner

from runtime import Encoder
from runtime.commands.app import app
from runtime.commands.doors import names_for_immich
from runtime.commands.serve import serve
from runtime.errors import InputError
from runtime.gateway.models import Residence
from runtime.gateway.options import GatewayOptions
from runtime.manifest import Manifest, Modality
from runtime.server import ServerEnvironment
from samples import dataset

CLIENT = Path(__file__).with_name("immich_client.mjs")
SERVED = ("capivara", "nllb-siglip-mrl")
NLLB = "nllb-siglip-mrl"
TEXTS = {
    "um gato preto": ("pt-BR", "por_Latn"),
    'un gato "negro"\r\ny blanco': ("es", "spa_Latn"),
    "黒い猫": ("ja", "jpn_Jpan"),
    "黑貓": ("zh-TW", "zho_Hant"),
    "melns kaķis": ("lv", "lvs_Latn"),
    "crna mačka": ("sr-Latn", "srp_Latn"),
    "kucing hitam": ("mfa", "zsm_Latn"),
    "შავი კატა": ("ka", "kat_Geor"),
    "svart katt": ("nb-NO", "nob_Latn"),
    "👩‍🚀 " * 60: ("en-US", "eng_Latn"),
}
"""Texts, the locale of an interface, and its language."""


def png(number: int) -> bytes:
    return dataset.load_gallery()[number].png


def jpeg(width: int, height: int) -> bytes:
    noise = np.random.default_rng(width).integers(0, 256, (5, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


def entries_of(kind: str, model: str, **options: Any) -> str:
    entry = {"modelName": model, **({"options": options} if options else {})}
    return json.dumps({"clip": {kind: entry}})


def asked_text(client: httpx.Client, model: str, text: str, **options: Any) -> httpx.Response:
    parts = {"entries": (None, entries_of("textual", model, **options)), "text": (None, text)}
    return client.post("/predict", files=parts)


def asked_image(client: httpx.Client, model: str, file: bytes) -> httpx.Response:
    return client.post(
        "/predict",
        files={
            "entries": (None, entries_of("visual", model)),
            "image": ("blob", file, "application/octet-stream"),
        },
    )


def vector_of(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    found = answer.json()["clip"]
    assert isinstance(found, str)
    return np.array(json.loads(found), np.float32)


def wait_until(holds: Callable[[], bool], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module", params=["server", "process"])
def gateway(
    request: pytest.FixtureRequest, exported: Exported, server_environment: ServerEnvironment
) -> Iterator[Gateway]:
    (repository,) = {exported(name).parent for name in SERVED}
    made = (
        gateway_of_server(repository, server_environment, SERVED, token=None)
        if request.param == "server"
        else gateway_of_process(repository, options=GatewayOptions())
    )
    with made as found:
        yield found


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as found:
        yield found


@pytest.mark.parametrize("release", ["release 2", "release 3"])
def test_requests_as_the_server_of_immich_sends_them(
    release: str, gateway: Gateway, exported: Exported, tmp_path: Path
) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    picture = tmp_path / "picture"
    picture.write_bytes(jpeg(90, 141))
    text = "un café “noir”\n--immich"
    with Encoder.open(exported(NLLB), threads=1) as encoder:
        of_text, of_image = encoder.embed_texts([text], "fr"), encoder.embed_images([picture])
    of_answer = {}
    for kind, payload in (("textual", {"text": text}), ("visual", {"image": str(picture)})):
        options = {"options": {"language": "fr"}} if kind == "textual" else {}
        asked = {
            "url": gateway.url,
            "form": release,
            "entries": {"clip": {kind: {"modelName": NLLB, **options}}},
            **payload,
        }
        done = subprocess.run(
            ["node", str(CLIENT)], input=json.dumps(asked), capture_output=True, text=True, check=False,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["status"], found["pong"]) == (200, "pong")
        of_answer[kind] = found["answer"]
    assert set(of_answer["textual"]) == {"clip"}
    assert of_answer["visual"].keys() == {"clip", "imageHeight", "imageWidth"}
    assert (of_answer["visual"]["imageWidth"], of_answer["visual"]["imageHeight"]) == (90, 141)
    for kind, expected in (("textual", of_text), ("visual", of_image)):
        vector = np.array(json.loads(of_answer[kind]["clip"]), np.float32)
        np.testing.assert_allclose(vector, expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_those_of_the_encoder(name: str, exported: Exported) -> None:
    files = [png(0), jpeg(200, 113), png(2)]
    with Encoder.open(exported(name), threads=1) as encoder:
        texts = encoder.embed_texts([*TEXTS], [language for _, language in TEXTS.values()])
        images = encoder.embed_images(files)
    with (
        gateway_of_process(exported(name).parent, options=GatewayOptions()) as found,
        found.client() as client,
    ):
        for text, expected in zip(TEXTS, texts, strict=True):
            answer = asked_text(client, name, text, language=TEXTS[text][0])
            np.testing.assert_allclose(vector_of(answer), expected, rtol=0, atol=1e-6)
            assert "babeltower-language" not in answer.headers
        for file, expected in zip(files, images, strict=True):
            answer = asked_image(client, name, file)
            np.testing.assert_allclose(vector_of(answer), expected, rtol=0, atol=1e-6)
            width, height = Image.open(io.BytesIO(file)).size
            assert (answer.json()["imageWidth"], answer.json()["imageHeight"]) == (width, height)


def test_many_clients_at_once_get_their_own_vectors(client: httpx.Client, exported: Exported) -> None:
    texts, files = [f"um gato {i}" for i in range(60)], [png(i) for i in range(8)]
    with Encoder.open(exported(NLLB), threads=1) as encoder:
        of_texts, of_images = encoder.embed_texts(texts, "por_Latn"), encoder.embed_images(files)

    def one(i: int) -> httpx.Response:
        if i % 5 == 4:
            return asked_image(client, NLLB, b"no image" if i % 2 else files[i % 8])
        return asked_text(client, NLLB, texts[i], language="pt")

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(one, range(len(texts))))
    for i, answer in enumerate(answers):
        if i % 5 == 4 and i % 2:
            assert answer.status_code == 400
        else:
            expected = of_images[i % 8] if i % 5 == 4 else of_texts[i]
            np.testing.assert_allclose(vector_of(answer), expected, rtol=0, atol=1e-6)


def test_a_language_that_is_not_known_is_english_and_said(
    client: httpx.Client, exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    with Encoder.open(exported(NLLB), threads=1) as encoder:
        english = encoder.embed_texts(["a black cat"], "eng_Latn")[0]
    for options in ({}, {"language": None}, {"language": ""}, {"language": "xx-YY"}, {"language": "gsw"}):
        answer = asked_text(client, NLLB, "a black cat", **options)
        np.testing.assert_allclose(vector_of(answer), english, rtol=0, atol=1e-6)
        assert answer.headers["babeltower-language"] == "eng_Latn"
    said = [record.getMessage() for record in caplog.records if "has no language" in record.getMessage()]
    asked_text(client, NLLB, "a black cat", language="xx-YY")
    assert len(said) <= 2
    answer = asked_text(client, "capivara", "a black cat", language="xx-YY")
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts(["a black cat"])[0]
    np.testing.assert_allclose(vector_of(answer), expected, rtol=0, atol=1e-6)


def test_the_default_language_takes_the_place_of_english(exported: Exported) -> None:
    with Encoder.open(exported(NLLB), threads=1) as encoder:
        expected = encoder.embed_texts(["gato"], "por_Latn")[0]
    options = GatewayOptions(default_language="por_Latn")
    with gateway_of_process(exported(NLLB).parent, options=options) as found, found.client() as client:
        for given in ({}, {"language": "xx-YY"}):
            answer = asked_text(client, NLLB, "gato", **given)
            np.testing.assert_allclose(vector_of(answer), expected, rtol=0, atol=1e-6)
            assert answer.headers["babeltower-language"] == "por_Latn"


def test_options_of_newer_releases_are_passed_over(client: httpx.Client) -> None:
    answer = asked_text(client, NLLB, "um gato", language="pt", somethingNew=[1, {"a": None}])
    assert answer.status_code == 200


ENTRY = {"modelName": "capivara"}
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no entries": ({"text": (None, "a")}, 422, "the field entries is missing"),
    "no JSON": ({"entries": (None, "{"), "text": (None, "a")}, 422, "entries is no JSON"),
    "a list": ({"entries": (None, "[]"), "text": (None, "a")}, 422, "task: {type"),
    "a task that is a list": ({"entries": (None, '{"clip": []}'), "text": (None, "a")}, 422, "task: {type"),
    "no task": ({"entries": (None, "{}"), "text": (None, "a")}, 422, "No model task requested"),
    "no type": ({"entries": (None, '{"clip": {}}'), "text": (None, "a")}, 422, "No model task requested"),
    "an unknown task": (
        {"entries": (None, json.dumps({"cook": {"a": ENTRY}})), "text": (None, "a")}, 422, "unknown task",
    ),
    "an unknown type": (
        {"entries": (None, json.dumps({"clip": {"tactile": ENTRY}})), "text": (None, "a")}, 422, "'tactile'",
    ),
    "both types": (
        {"entries": (None, json.dumps({"clip": {"textual": ENTRY, "visual": ENTRY}})), "text": (None, "a")},
        422, "textual or visual",
    ),
    "no model": ({"entries": (None, '{"clip": {"textual": {}}}'), "text": (None, "a")}, 422, "no modelName"),
    "a model that is a number": (
        {"entries": (None, '{"clip": {"textual": {"modelName": 1}}}'), "text": (None, "a")}, 422, "modelName",
    ),
    "options that are a list": (
        {"entries": (None, '{"clip": {"textual": {"modelName": "capivara", "options": []}}}'),
         "text": (None, "a")}, 422, "options is no object",
    ),
    "a language that is a number": (
        {"entries": (None, entries_of("textual", "capivara", language=1)), "text": (None, "a")}, 422,
        "options.language",
    ),
    "another model": (
        {"entries": (None, entries_of("textual", "ViT-B-32__openai")), "text": (None, "a")}, 404,
        "--immich-name ViT-B-32__openai=MODEL",
    ),
    "faces": (
        {"entries": (None, json.dumps({"facial-recognition": {"detection": ENTRY, "recognition": ENTRY}})),
         "image": ("blob", b"x")}, 501, "--other-tasks-url",
    ),
    "OCR": (
        {"entries": (None, json.dumps({"ocr": {"detection": ENTRY}})), "image": ("blob", b"x")}, 501,
        "ocr: this service has models of the task clip only",
    ),
    "neither text nor image": (
        {"entries": (None, entries_of("textual", "capivara"))}, 400, "Either image or text must be provided",
    ),
    "a text for the image tower": (
        {"entries": (None, entries_of("visual", "capivara")), "text": (None, "a")}, 400, "needs an image",
    ),
    "an image for the text tower": (
        {"entries": (None, entries_of("textual", "capivara")), "image": ("blob", b"x")}, 400, "needs a text",
    ),
    "no image file": (
        {"entries": (None, entries_of("visual", "capivara")), "image": ("blob", b"no image")}, 400, "Image",
    ),
    "an empty image": (
        {"entries": (None, entries_of("visual", "capivara")), "image": ("blob", b"")}, 400, "empty",
    ),
    "a text that is not UTF-8": (
        {"entries": (None, entries_of("textual", "capivara")), "text": (None, b"\xff")}, 422, "not UTF-8",
    ),
    "a long text": (
        {"entries": (None, entries_of("textual", "capivara")), "text": (None, "a" * 20_000)}, 400,
        "the limit is 16384",
    ),
    "long entries": (
        {"entries": (None, entries_of("textual", "capivara", language="a" * 70_000)), "text": (None, "a")},
        413, "entries exceed",
    ),
    "nested entries": (
        {"entries": (None, '{"clip":' * 40 + "1" + "}" * 40), "text": (None, "a")}, 400, "nested",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_requests_are_refused_in_the_shape_of_the_service(what: str, client: httpx.Client) -> None:
    parts, status, said = REFUSED[what]
    answer = client.post("/predict", files=parts)
    assert answer.status_code == status
    assert answer.json().keys() == {"detail"}
    assert said in answer.json()["detail"]


def test_bodies_that_are_no_form_are_refused(client: httpx.Client) -> None:
    form = "multipart/form-data; boundary=b"
    part = b'--b\r\nContent-Disposition: form-data; name="entries"\r\n\r\n{}\r\n'
    for content, kind in (
        (b'{"entries": {}}', "application/json"),
        (b"entries=%7B%7D", "application/x-www-form-urlencoded"),
        (part + b"--b--\r\n", "multipart/form-data"),
        (b"", form),
        (part, form),
        (part + part + b"--b--\r\n", form),
        (b"--b\r\nContent-Disposition: attachment\r\n\r\na\r\n--b--\r\n", form),
        (b"--b\r\n" + b"A: b\r\n" * 1_000 + b"\r\na\r\n--b--\r\n", form),
        (b"\x00" * 100_000, form),
        (part * 0 + b"".join(part.replace(b"entries", b"%d" % i) for i in range(20)) + b"--b--\r\n", form),
    ):
        answer = client.post("/predict", content=content, headers={"content-type": kind})
        assert answer.status_code == 422, (content[:80], answer.text)
        assert "Invalid request format" in answer.json()["detail"]
    large = client.post("/predict", content=bytes(34 << 20), headers={"content-type": form})
    assert large.status_code == 413
    assert client.get("/predict").status_code == 405


def test_images_are_bounded_as_on_the_other_routes(client: httpx.Client) -> None:
    file = io.BytesIO()
    Image.new("L", (8_000, 5_000)).save(file, "PNG")
    answer = asked_image(client, "capivara", file.getvalue())
    assert answer.status_code == 400
    assert "pixels" in answer.json()["detail"]


def test_immich_sends_no_token_so_that_predict_needs_one_and_ping_does_not(exported: Exported) -> None:
    with gateway_of_process(exported("capivara").parent, options=GatewayOptions(TOKEN)) as found:
        with httpx.Client(base_url=found.url, trust_env=False, timeout=60) as stranger:
            assert stranger.get("/ping").text == "pong"
            refused = asked_text(stranger, "capivara", "a")
            assert refused.status_code == 401
            assert "Authorization: Bearer" in refused.json()["detail"]
        with found.client() as friend:
            assert asked_text(friend, "capivara", "a").status_code == 200
            assert friend.get("/").json() == {"message": "babeltower"}
            page = friend.get("/metrics").text
            assert 'babeltower_gateway_requests_total{route="/predict",status="200"}' in page
            assert 'babeltower_gateway_inputs_total{kind="text",model="capivara"}' in page


def test_a_model_answers_to_the_names_that_are_given(exported: Exported) -> None:
    repository = exported("capivara").parent
    assert names_for_immich(repository, ["ViT-B-32__openai=capivara"])["ViT-B-32__openai"] == "capivara"
    assert names_for_immich(None, ["a=b"]) == {"a": "b"}
    for given, said in (
        (["ViT-B-32__openai"], "is not NAME=MODEL"),
        (["=a"], "is not NAME=MODEL"),
        (["a=nothing"], "there is no model 'nothing'"),
        (["a=capivara", "a=capivara"], "is taken already"),
        (["capivara=capivara"], "is taken already"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            names_for_immich(repository, given)
    options = GatewayOptions(immich_names={"ViT-B-32__openai": "capivara"})
    with gateway_of_process(repository, options=options) as found, found.client() as client:
        own, other = (asked_text(client, name, "um gato") for name in ("capivara", "ViT-B-32__openai"))
        assert own.json() == other.json()


def test_the_only_model_of_an_architecture_and_its_width_has_immichs_name(
    exported: Exported, tmp_path: Path
) -> None:
    facts = {"name": "my-nllb", "architecture": "nllb-clip-base-siglip", "dim": 768, "mrl_dims": ()}
    published = dataclasses.replace(Manifest.read(exported(NLLB)), **facts)
    (tmp_path / "my-nllb.babeltower.json").write_text(published.to_json())
    assert names_for_immich(tmp_path, []) == {"nllb-clip-base-siglip__v1": "my-nllb"}
    narrow = dataclasses.replace(published, dim=64)
    (tmp_path / "my-nllb.babeltower.json").write_text(narrow.to_json())
    assert names_for_immich(tmp_path, []) == {}
    for name in ("my-nllb", "another"):
        two = dataclasses.replace(published, name=name)
        (tmp_path / f"{name}.babeltower.json").write_text(two.to_json())
    assert names_for_immich(tmp_path, []) == {}
    chosen = names_for_immich(tmp_path, ["nllb-clip-base-siglip__v1=another"])
    assert chosen == {"nllb-clip-base-siglip__v1": "another"}


class _Service(BaseHTTPRequestHandler):
    """A service of other tasks, whose forms are read by Python's own parser."""

    asked: ClassVar[list[dict[str, Any]]] = []
    answer: ClassVar[tuple[int, bytes]] = (200, b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        fields = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in form.iter_parts()
        }
        self.asked.append({"path": self.path, **fields})
        status, page = self.answer
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def other_service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _Service.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_other_tasks_are_passed_on_and_their_answers_joined(exported: Exported, other_service: str) -> None:
    face = [{"boundingBox": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}, "embedding": "[0.5]", "score": 0.9}]
    faces = {"detection": {"modelName": "buffalo_l", "options": {"minScore": 0.7}}, "recognition": ENTRY}
    file = jpeg(64, 48)
    _Service.answer = (
        200,
        json.dumps({"facial-recognition": face, "imageHeight": 48, "imageWidth": 64}).encode(),
    )
    options = GatewayOptions(other_tasks_url=other_service)
    with gateway_of_process(exported("capivara").parent, options=options) as found, found.client() as client:
        for clip in ({}, {"clip": {"visual": ENTRY}}):
            entries = json.dumps({"facial-recognition": faces, **clip})
            parts: dict[str, Any] = {"entries": (None, entries), "image": ("blob", file)}
            answer = client.post("/predict", files=parts)
            assert answer.status_code == 200, answer.text
            assert answer.json()["facial-recognition"] == face
            assert ("clip" in answer.json()) is bool(clip)
            asked = _Service.asked.pop()
            assert asked["path"] == "/predict"
            assert json.loads(asked["entries"]) == {"facial-recognition": faces}
            assert asked["image"] == file
        for status, page, expected, said in (
            (500, b"its own words", 500, "answered 500: its own words"),
            (302, b"", 502, "answered 302"),
            (200, b"[]", 502, "no JSON object"),
            (200, b"[" * 100_000, 502, "no JSON object"),
            (200, bytes(17 << 20), 502, "more than"),
        ):
            _Service.answer = status, page
            refused = client.post(
                "/predict", files={"entries": (None, json.dumps({"ocr": faces})), "text": (None, "é")}
            )
            assert (refused.status_code, said in refused.json()["detail"]) == (expected, True)
        assert _Service.asked[-1]["text"].decode() == "é"


def test_a_service_of_other_tasks_that_is_away_is_an_error(exported: Exported) -> None:
    options = GatewayOptions(other_tasks_url="http://127.0.0.1:9")
    with gateway_of_process(exported("capivara").parent, options=options) as found, found.client() as client:
        parts = {"entries": (None, json.dumps({"ocr": {"detection": ENTRY}})), "image": ("blob", b"x")}
        answer = client.post("/predict", files=parts)
        assert answer.status_code == 502
        assert "cannot be reached" in answer.json()["detail"]
        assert asked_text(client, "capivara", "a").status_code == 200


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_idle_towers_give_their_memory_back_and_answer_again(exported: Exported) -> None:
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        text, image = encoder.embed_texts(["um gato"])[0], encoder.embed_images([png(0)])[0]
    process = subprocess.Popen(
        [sys.executable, "-m", "babeltower", "serve", str(exported("capivara").parent), "--http-api",
         "--in-process", "--port=0", "--unload-after=1", "--immich-name=ViT-B-32__openai=capivara"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next(line.split()[1] for line in lines if line.startswith("http "))
        with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
            before = resident_bytes(process.pid)
            for _ in range(2):
                np.testing.assert_allclose(
                    vector_of(asked_text(client, "ViT-B-32__openai", "um gato")), text, rtol=0, atol=1e-6
                )
                np.testing.assert_allclose(
                    vector_of(asked_image(client, "capivara", png(0))), image, rtol=0, atol=1e-6
                )
                loaded = resident_bytes(process.pid)
                assert loaded > before
                most = before + (loaded - before) / 2
                wait_until(lambda most=most: resident_bytes(process.pid) < most)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_towers_that_are_kept_stay_and_others_come_and_go(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.local import LocalEncoder

    encoders: list[LocalEncoder] = []
    opened: list[Modality] = []
    open_tower = LocalEncoder.open_tower

    def noted(self: LocalEncoder, modality: Modality) -> None:
        encoders.append(self)
        opened.append(modality)
        open_tower(self, modality)

    monkeypatch.setattr(LocalEncoder, "open_tower", noted)
    residence = Residence(0.2, frozenset({Modality.TEXT}))
    options = GatewayOptions()
    repository = exported("capivara").parent
    with (
        gateway_of_process(repository, options=options, residence=residence) as found,
        found.client() as client,
    ):
        of = next(encoder for encoder in encoders if encoder.name == "capivara")
        wait_until(lambda: not of.is_tower_open(Modality.IMAGE))
        assert of.is_tower_open(Modality.TEXT)
        first = asked_image(client, "capivara", png(0))
        assert first.status_code == 200
        wait_until(lambda: not of.is_tower_open(Modality.IMAGE))
        assert asked_image(client, "capivara", png(0)).json() == first.json()
        assert of.is_tower_open(Modality.TEXT)
        assert opened.count(Modality.IMAGE) >= 3


def test_requests_while_towers_come_and_go_are_all_answered(exported: Exported) -> None:
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts(["um gato"])[0]
    residence = Residence(0.001)
    repository = exported("capivara").parent
    with (
        gateway_of_process(repository, options=GatewayOptions(), residence=residence) as found,
        found.client() as client,
    ):

        def one(i: int) -> httpx.Response:
            time.sleep(i % 7 / 500)  # so that some arrive while a tower is given back
            return asked_text(client, "capivara", "um gato")

        with ThreadPoolExecutor(3) as clients:
            for answer in clients.map(one, range(60)):
                np.testing.assert_allclose(vector_of(answer), expected, rtol=0, atol=1e-6)


def test_a_model_that_was_replaced_while_it_was_unloaded_is_not_opened(
    exported: Exported, tmp_path: Path
) -> None:
    source, repository = exported("capivara").parent, tmp_path / "models"
    repository.mkdir()
    for path in source.iterdir():
        if re.match(r"capivara(?!-lora)", path.name):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, repository / path.name)
    with (
        gateway_of_process(repository, options=GatewayOptions(), residence=Residence(0.05)) as found,
        found.client() as client,
    ):
        assert asked_text(client, "capivara", "um gato").status_code == 200
        graph = next(repository.glob("capivara_text_tower_*/1/model.onnx"))
        content = graph.read_bytes()
        graph.unlink()
        graph.write_bytes(content)

        def refused() -> bool:
            time.sleep(0.1)
            answer = asked_text(client, "capivara", "um gato")
            return answer.status_code == 500 and "was changed after the model was opened" in answer.text

        wait_until(refused)


def test_the_compose_file_of_the_page_names_options_that_exist() -> None:
    page = (ROOT / "docs" / "immich.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    services = yaml.safe_load(block)["services"]
    command = services["babeltower"]["command"].split()
    assert command[:3] == ["babeltower", "serve", "/models"]
    alone = typer.Typer()
    alone.command()(serve)
    known = {option for parameter in typer.main.get_command(alone).params for option in parameter.opts}
    assert {word for word in command if word.startswith("--")} <= known
    port = command[command.index("--port") + 1]
    assert services["immich-server"]["environment"] == {
        "IMMICH_MACHINE_LEARNING_URL": f"http://babeltower:{port}"
    }
    assert "ports" not in services["babeltower"], "immich sends no token"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--immich-name", "a=b"], "need --http-api"),
        (["--other-tasks-url", "http://a"], "need --http-api"),
        (["--http-api", "--unload-after", "5"], "need --in-process"),
        (["--http-api", "--preload", "text"], "need --in-process"),
        (["--http-api", "--in-process", "--other-tasks-url", "ftp://a"], "is no address of a service"),
        (["--http-api", "--in-process", "--other-tasks-url", "nowhere"], "is no address of a service"),
        (["--http-api", "--in-process", "--immich-name", "a=b"], "there is no model 'b'"),
        (["--http-api", "--in-process", "--immich-name", "a"], "is not NAME=MODEL"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], said: str, exported: Exported) -> None:
    done = CliRunner().invoke(app, ["serve", str(exported("capivara").parent), "--port=0", *options])
    assert done.exit_code == 1
    assert said in " ".join(done.output.split())
