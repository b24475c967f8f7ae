"""Clients that this project did not write get the in-process vectors from the gateway."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from gateways import TOKEN, Gateway, gateway_of_process, gateway_of_server
from PIL import Image
from sample_models import Exported

from runtime import Encoder
from runtime.server import ServerEnvironment
from samples import dataset

NAMES = ("capivara", "nllb-siglip-mrl")
TEXTS = ["um gato preto", "猫", "مرحبا بالعالم", "e\u0301 \u00e9", "a red bicycle " * 40, "👩‍🚀", "\ta\nb  "]
LANGUAGES = ["por_Latn", "zh", "ar", "fra_Latn", "en", "eng_Latn", "it"]

FRAMEWORKS = {
    "langchain_openai": """
import json, sys
from langchain_openai import OpenAIEmbeddings
url, token, texts = json.load(sys.stdin)
model = OpenAIEmbeddings(
    model="capivara", base_url=url, api_key=token, check_embedding_ctx_length=False
)
print(json.dumps([*model.embed_documents(texts), model.embed_query(texts[0])]))
""",
    "llama_index.embeddings.openai": """
import json, sys
from llama_index.embeddings.openai import OpenAIEmbedding
url, token, texts = json.load(sys.stdin)
model = OpenAIEmbedding(model_name="capivara", api_base=url, api_key=token)
print(json.dumps([*model.get_text_embedding_batch(texts), model.get_query_embedding(texts[0])]))
""",
}
"""Each prints the vectors of the texts, and of the first one as a query."""


@pytest.fixture(scope="module", params=["server", "process"])
def gateway(
    request: pytest.FixtureRequest, exported: Exported, server_environment: ServerEnvironment
) -> Iterator[Gateway]:
    (repository,) = {exported(name).parent for name in NAMES}
    made = (
        gateway_of_server(repository, server_environment, NAMES, token=TOKEN)
        if request.param == "server"
        else gateway_of_process(repository)
    )
    with made as found:
        yield found


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.token, max_retries=0) as found:
        yield found


def vectors(answer: Any) -> np.ndarray:
    assert [row.index for row in answer.data] == list(range(len(answer.data)))
    return np.array([row.embedding for row in answer.data], np.float32)


def png(number: int) -> bytes:
    return dataset.load_gallery()[number].png


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(number))).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def data_url(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openai_texts(encoding: str | None, client: openai.OpenAI, exported: Exported) -> None:
    options: dict[str, Any] = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model="capivara", input=TEXTS, **options)
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts(TEXTS)
    if encoding == "base64":
        found = np.stack([np.frombuffer(base64.b64decode(r.embedding), "<f4") for r in answer.data])
    else:
        found = vectors(answer)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert answer.model == "capivara"


def test_openai_one_text(client: openai.OpenAI, exported: Exported) -> None:
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts(["um gato"])
    found = vectors(client.embeddings.create(model="capivara", input="um gato"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [None, 64])
def test_openai_languages_and_dimensions(dim: int | None, client: openai.OpenAI, exported: Exported) -> None:
    with Encoder.open(exported("nllb-siglip-mrl"), threads=1) as encoder:
        expected = encoder.embed_texts(TEXTS, LANGUAGES, dim=dim)
        alike = encoder.embed_texts(TEXTS, "por_Latn", dim=dim)
    options: dict[str, Any] = {} if dim is None else {"dimensions": dim}
    inputs = [{"text": text, "language": code} for text, code in zip(TEXTS, LANGUAGES, strict=True)]
    for given, languages in ((TEXTS, LANGUAGES), (inputs, None), (inputs, "eng_Latn")):
        extra = {} if languages is None else {"language": languages}
        found = vectors(
            client.embeddings.create(
                model="nllb-siglip-mrl",
                input=given,
                extra_body=extra,
                **options,  # type: ignore[arg-type]
            )
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    answer = client.embeddings.create(
        model="nllb-siglip-mrl", input=TEXTS, extra_body={"language": "por_Latn"}, **options
    )
    np.testing.assert_allclose(vectors(answer), alike, rtol=0, atol=1e-6)


def test_openai_images(client: openai.OpenAI, exported: Exported) -> None:
    files = [png(0), jpeg(1), png(2)] * 7
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_images(files)
    bare = [base64.b64encode(file).decode() for file in files]
    forms: list[tuple[Any, dict[str, str]]] = [
        ([data_url(file) for file in files], {}),
        (bare, {"modality": "image"}),
        ([{"image": text} for text in bare], {}),
    ]
    for given, extra in forms:
        answer = client.embeddings.create(model="capivara", input=given, extra_body=extra)
        np.testing.assert_allclose(vectors(answer), expected, rtol=0, atol=1e-6)


def test_texts_and_images_mix(client: openai.OpenAI, exported: Exported) -> None:
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        texts, images = encoder.embed_texts(["a", "b"]), encoder.embed_images([png(0), png(1)])
    given = ["a", data_url(png(0)), "b", data_url(png(1))]
    found = vectors(client.embeddings.create(model="capivara", input=given))
    np.testing.assert_allclose(found, np.stack([texts[0], images[0], texts[1], images[1]]), rtol=0, atol=1e-6)


def test_a_text_that_looks_like_an_image_is_embedded_where_it_is_meant(
    client: openai.OpenAI, exported: Exported
) -> None:
    text = "data:image/png;base64,AAAA"
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts([text])
    for given, extra in ((text, {"modality": "text"}), ([{"text": text}], {})):
        answer = client.embeddings.create(model="capivara", input=given, extra_body=extra)  # type: ignore[arg-type]
        np.testing.assert_allclose(vectors(answer), expected, rtol=0, atol=1e-6)


def test_clients_at_once_get_their_own_vectors(client: openai.OpenAI, exported: Exported) -> None:
    texts = [f"{TEXTS[i % 3]} {i}" for i in range(200)]
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts(texts)

    def one(i: int) -> Any:
        given = {"image": "AAAA"} if i % 20 == 7 else texts[i]
        try:
            return client.embeddings.create(model="capivara", input=[given])  # type: ignore[list-item]
        except openai.BadRequestError as error:
            return error

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(one, range(len(texts))))
    for i, answer in enumerate(answers):
        if i % 20 == 7:
            assert isinstance(answer, openai.BadRequestError)
        else:
            np.testing.assert_allclose(vectors(answer)[0], expected[i], rtol=0, atol=1e-6)


def test_the_models_are_listed(client: openai.OpenAI, exported: Exported) -> None:
    found = {model.id: model for model in client.models.list()}
    assert set(found) >= set(NAMES)
    with Encoder.open(exported("nllb-siglip-mrl"), threads=1) as encoder:
        model = client.models.retrieve("nllb-siglip-mrl")
        assert model.to_dict()["dimensions"] == list(encoder.dims)
        assert model.to_dict()["fingerprint"] == encoder.fingerprint
    with pytest.raises(openai.NotFoundError, match="There is no model 'x'"):
        client.models.retrieve("x")


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_frameworks(package: str, gateway: Gateway, exported: Exported) -> None:
    """Their packages are not of this environment: BABELTOWER_CLIENTS_PYTHON is a Python that has them."""
    python = os.environ.get("BABELTOWER_CLIENTS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no {package}")
    done = subprocess.run(
        [python, "-c", FRAMEWORKS[package]],
        input=json.dumps([f"{gateway.url}/v1", gateway.token, TEXTS]),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    texts = [*TEXTS, TEXTS[0]]
    if package.startswith("llama_index"):
        texts = [text.replace("\n", " ") for text in texts]  # as its class does before it asks
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts(texts)
    np.testing.assert_allclose(np.array(json.loads(done.stdout), np.float32), expected, rtol=0, atol=1e-6)


def test_the_certificate_of_a_gateway_is_checked(exported: Exported, tmp_path: Path) -> None:
    from tls_double import authority

    from runtime.gateway.options import GatewayOptions

    own, other = authority(tmp_path / "own"), authority(tmp_path / "other")
    options = GatewayOptions(TOKEN, own.certificate, own.key)
    with gateway_of_process(exported("capivara").parent, options=options) as found:
        assert found.url.startswith("https://")
        import ssl

        import httpx

        for checked_with, passes in ((own, True), (other, False)):
            context = ssl.create_default_context(cafile=str(checked_with.ca))
            with httpx.Client(verify=context, headers=found.headers, trust_env=False) as asked:
                if passes:
                    assert asked.get(f"{found.url}/v1/models").status_code == 200
                else:
                    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                        asked.get(f"{found.url}/v1/models")
