"""A real Triton server: strings and image files in, over gRPC and HTTP, the in-process vectors out."""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import promql_parser
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from raw_client import bytes_column, infer
from sample_models import NAMES, Exported
from tritonclient.utils import InferenceServerException

from runtime import Encoder
from runtime.manifest import Manifest
from runtime.server import Server
from runtime.server.alerts import expressions_of_alerts
from runtime.server.dashboard import dashboard
from samples import dataset

TEXTS = ("um gato preto", "猫", "مرحبا بالعالم", "e\u0301 \u00e9", "a red bicycle " * 40, "👩‍🚀", "vulcano")
LANGUAGES = ("por_Latn", "zh", "ar", "fra_Latn", "en", "eng_Latn", "it")


@pytest.fixture(params=["grpc", "http"])
def ask(request: pytest.FixtureRequest, served: Server) -> Any:
    """Model and inputs → float32 (rows, dim), over each protocol."""
    if request.param == "grpc":
        client, module = tritonclient.grpc.InferenceServerClient(served.addresses.grpc), tritonclient.grpc
    else:
        client, module = tritonclient.http.InferenceServerClient(served.addresses.http), tritonclient.http
    yield lambda model, **inputs: infer(client, module, model, inputs).as_numpy("vector")
    client.close()


def image_files() -> list[bytes]:
    """One drawing in the formats, modes and shapes that come in."""
    drawing = Image.open(io.BytesIO(dataset.load_gallery()[0].png))
    rgb = drawing.convert("RGB")
    forms = [
        (drawing.convert("RGBA"), "PNG"),
        (rgb, "JPEG"),
        (rgb, "WEBP"),
        (rgb.convert("P"), "GIF"),
        (rgb.convert("L"), "BMP"),
        (rgb.convert("CMYK"), "TIFF"),
        (rgb.resize((90, 31)), "PNG"),
    ]
    files = []
    for image, kind in forms:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        files.append(buffer.getvalue())
    return files


@pytest.mark.parametrize("name", NAMES)
def test_texts_equal_the_in_process_ones(name: str, exported: Exported, ask: Any) -> None:
    with Encoder.open(exported(name), threads=1) as encoder:
        expected = encoder.embed_texts(TEXTS, LANGUAGES)
    found = ask(f"{name}_text", text=bytes_column(TEXTS), language=bytes_column(LANGUAGES))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_images_equal_the_in_process_ones(name: str, exported: Exported, ask: Any) -> None:
    with Encoder.open(exported(name), threads=1) as encoder:
        expected = encoder.embed_images(image_files())
    found = ask(f"{name}_image", image=bytes_column(image_files()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["nllb-clip", "altclip"])
def test_vectors_equal_those_of_pytorch(name: str, checkpoints: Path, ask: Any) -> None:
    from export.checkpoint import towers_from_checkpoint

    codes = ("por_Latn", "zho_Hans", "arb_Arab", "fra_Latn", "eng_Latn", "eng_Latn", "ita_Latn")
    reference = towers_from_checkpoint(checkpoints / name).reference
    texts = ask(f"{name}_text", text=bytes_column(TEXTS), language=bytes_column(LANGUAGES))
    np.testing.assert_allclose(texts, reference.embed_texts(TEXTS, codes), rtol=0, atol=1e-5)
    images = ask(f"{name}_image", image=bytes_column(image_files()))
    opened = [Image.open(io.BytesIO(file)) for file in image_files()]
    np.testing.assert_allclose(images, reference.embed_images(opened), rtol=0, atol=1e-5)


def test_narrower_heads_are_asked_for_by_width(exported: Exported, ask: Any) -> None:
    with Encoder.open(exported("nllb-siglip-mrl"), threads=1) as encoder:
        dim = encoder.dims[0]
        expected = encoder.embed_texts(["gato"], "por_Latn", dim=dim)
    found = ask(
        "nllb-siglip-mrl_text",
        text=bytes_column(["gato"]),
        language=bytes_column(["por_Latn"]),
        dim=np.array([[dim]], np.int32),
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("nllb-clip_text", {"text": ["gato"]}, "needs the language"),
        ("nllb-clip_text", {"text": ["gato"], "language": ["xx-nowhere"]}, "'xx-nowhere' is unknown"),
        ("nllb-clip_text", {"text": [""], "language": ["pt"]}, "is empty"),
        ("nllb-clip_text", {"text": [b"\xff\xfe"], "language": ["pt"]}, "not UTF-8"),
        ("capivara_text", {"text": ["x" * 20_000]}, "20000 characters; the limit is 16384"),
        ("capivara_text", {"text": ["x" * 70_000]}, "70000 bytes; the limit is 65536"),
        ("capivara_image", {"image": [b""]}, "it is empty"),
        ("capivara_image", {"image": [b"GIF89a nonsense"]}, "cannot be decoded"),
        ("capivara_image", {"image": [b"no image at all"]}, "its format is unknown"),
    ],
)
def test_bad_requests_are_told_why(
    model: str, inputs: Mapping[str, list[Any]], message: str, served: Server
) -> None:
    client = tritonclient.grpc.InferenceServerClient(served.addresses.grpc)
    tensors = {name: bytes_column(items) for name, items in inputs.items()}
    with pytest.raises(InferenceServerException, match=re.escape(message)) as failure:
        infer(client, tritonclient.grpc, model, tensors)
    assert failure.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_decompression_bomb_is_refused(served: Server) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(bomb, "PNG")
    client = tritonclient.grpc.InferenceServerClient(served.addresses.grpc)
    with pytest.raises(InferenceServerException, match="pixels") as failure:
        infer(client, tritonclient.grpc, "capivara_image", {"image": bytes_column([bomb.getvalue()])})
    assert failure.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_wrong_types_and_widths_are_refused(served: Server) -> None:
    client = tritonclient.grpc.InferenceServerClient(served.addresses.grpc)
    for inputs in (
        {"text": np.array([[1]], np.int32)},
        {"text": bytes_column("a"), "dim": np.array([[7]], np.int32)},
    ):
        with pytest.raises(InferenceServerException) as failure:
            infer(client, tritonclient.grpc, "capivara_text", inputs)
        assert failure.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_blank_text_is_embedded_where_it_is_meant(exported: Exported, served: Server) -> None:
    client = tritonclient.grpc.InferenceServerClient(served.addresses.grpc)
    inputs = {"text": bytes_column([""])}
    found = infer(client, tritonclient.grpc, "capivara_text", inputs, parameters={"blank": "embed"})
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts([""])
    np.testing.assert_allclose(found.as_numpy("vector"), expected, rtol=0, atol=1e-6)


def test_under_load_texts_are_batched_and_bad_ones_fail_alone(exported: Exported, served: Server) -> None:
    client = tritonclient.grpc.InferenceServerClient(served.addresses.grpc)
    texts = [f"{TEXTS[i % 3]} {i}" for i in range(240)]
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts(texts)

    def one(i: int) -> Any:
        item: str | bytes = b"\xff" if i % 20 == 7 else texts[i]
        try:
            return infer(client, tritonclient.grpc, "capivara_text", {"text": bytes_column([item])})
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(one, range(len(texts))))
    for i, answer in enumerate(answers):
        if i % 20 == 7:
            assert answer.status() == "StatusCode.INVALID_ARGUMENT"
        else:
            np.testing.assert_allclose(answer.as_numpy("vector")[0], expected[i], rtol=0, atol=1e-6)
    statistics = client.get_inference_statistics("capivara_text").model_stats[0]
    assert statistics.inference_count / statistics.execution_count > 1


def test_the_server_exports_every_metric_of_the_dashboard(served: Server) -> None:
    client = tritonclient.grpc.InferenceServerClient(served.addresses.grpc)
    given = ["a cat", "a cat sat", "a " * 500]  # two that are padded, and one that is truncated
    texts = {"text": bytes_column(given), "language": bytes_column(["en"] * len(given))}
    infer(client, tritonclient.grpc, "nllb-clip_text", texts)
    for files in (image_files()[:1], [b"no image"]):
        with contextlib.suppress(InferenceServerException):
            infer(client, tritonclient.grpc, "nllb-clip_image", {"image": bytes_column(files)})
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    selectors = [found for text in (*panels, *expressions_of_alerts()) for found in selectors_of(text)]
    deadline = time.monotonic() + 10  # counters are published once a second

    def missing() -> list[str]:
        samples = list(text_string_to_metric_families(served.metrics()))
        lines = [sample for family in samples for sample in family.samples]
        return [repr(each) for each in selectors if not any(matches(each, line) for line in lines)]

    while (lacking := missing()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not lacking


def selectors_of(expression: str) -> list[Any]:
    """Every vector selector of a PromQL expression, found by walking its syntax tree."""
    found, todo = [], [promql_parser.parse(expression)]
    while todo:
        node = todo.pop()
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        names = ("expr", "lhs", "rhs", "args", "vector_selector", "param")
        for child in (getattr(node, name, None) for name in names):
            todo += child if isinstance(child, list) else [] if child is None else [child]
    return found


def matches(selector: Any, sample: Any) -> bool:
    """Whether a sample of a scrape is selected."""
    # The parser gives every counter the name that OpenMetrics wants.
    if sample.name not in (selector.name, f"{selector.name}_total"):
        return False
    for matcher in selector.matchers.matchers:
        value = sample.labels.get(matcher.name, "")
        fits = (
            value == matcher.value
            if matcher.op == promql_parser.MatchOp.Equal
            else bool(re.fullmatch(matcher.value, value))
        )
        if not fits:
            return False
    return True


def test_front_ends_say_what_they_are_and_count(exported: Exported, served: Server) -> None:
    manifest = Manifest.read(exported("nllb-siglip-mrl"))
    client = tritonclient.grpc.InferenceServerClient(served.addresses.grpc)
    config = client.get_model_config("nllb-siglip-mrl_text").config
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters["babeltower_fingerprint"] == manifest.fingerprint
    assert parameters["babeltower_engine"] == "onnxruntime"
    assert parameters["babeltower_dims"] == ",".join(map(str, sorted({*manifest.mrl_dims, manifest.dim})))
    manifest.verify_front_ends(exported("nllb-siglip-mrl").parent)
