"""The front ends' logic and what is written for them, without a server."""

from __future__ import annotations

import ast
import dataclasses
import gc
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from gpu_repository import repository_for_cuda
from numpy.typing import NDArray
from PIL import Image
from sample_models import NAMES, Exported
from stock_backends import config_of_folder, require_accepted
from tower_double import tower_from_call
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

from export.triton.frontends import FrontEndSettings, frontends_from_model
from export.triton.tower_config import TowerSettings
from export.triton.vendoring import code_of_module
from runtime.commands.app import app
from runtime.errors import (
    EngineError,
    ExportError,
    ImageError,
    InputError,
    LanguageError,
    ManifestError,
    error_from_message,
    message_from_error,
)
from runtime.manifest import Manifest, Precision
from runtime.preprocessing.buckets import text_buckets
from runtime.preprocessing.text import Tokenizer
from runtime.server import Server, ServerEnvironment, ServerOptions, running_server
from runtime.server.dashboard import dashboard
from triton_models.answers import AnswerVectors, Code, Failure, TowerError
from triton_models.counters import DESCRIPTIONS, Counters, LabelledName, bucket_label
from triton_models.image_frontend import ImageFrontEnd, ImageRequest
from triton_models.spec import (
    ImageLimits,
    ImageSpec,
    TextLimits,
    TextSpec,
    limits_from_parameters,
    spec_from_folder,
)
from triton_models.text_frontend import TextFrontEnd, TextRequest
from triton_models.tower import groups_by_shape


@pytest.mark.parametrize(("length", "label"), [(1, "1-8"), (8, "1-8"), (9, "9-16"), (77, "65-128")])
def test_bucket_labels(length: int, label: str) -> None:
    assert bucket_label(length) == label


def test_counters_reach_the_server_with_their_labels() -> None:
    published: list[Any] = []
    counters = Counters(lambda key, n: published.append((key, n)), {"model": "m"}, log=print, interval_s=60)
    counters.add("a_total", 2, language="por_Latn")
    counters.add("a_total", 3, language="por_Latn")
    counters.add("nothing_total", 0)
    counters.close()
    assert published == [(("a_total", (("language", "por_Latn"), ("model", "m"))), 5)]


def test_counts_that_cannot_be_published_are_logged_and_published_later() -> None:
    asked = threading.Semaphore(0)
    published: list[Any] = []
    said: list[str] = []
    is_broken = True

    def publish(key: LabelledName, amount: int) -> None:
        if is_broken and key[0] == "a_total":
            asked.release()
            raise RuntimeError("no such metric")
        published.append((key[0], amount))

    counters = Counters(publish, {}, log=said.append, interval_s=0.01)
    counters.declare("declared_total")
    counters.add("a_total", 2)
    counters.add("b_total", 3)
    for _ in range(3):  # the thread goes on
        assert asked.acquire(timeout=60)
    is_broken = False
    counters.add("a_total", 5)
    counters.close()
    assert said[0].endswith("counters are not published yet: RuntimeError: no such metric")
    assert sum(amount for name, amount in published if name == "a_total") == 7
    assert [found for found in published if found[0] != "a_total"] == [("declared_total", 0), ("b_total", 3)]


def test_requests_group_by_shape() -> None:
    shapes = [(1, 8), (3, 8), (2, 9), (1, 8)]
    assert groups_by_shape([{"input_ids": np.zeros(shape)} for shape in shapes]) == [[0, 1, 3], [2]]


@pytest.fixture
def front_end(exported: Exported) -> Any:
    """The text front end of a sample before a tower that a test chooses."""
    folder = exported("nllb-siglip-mrl").with_name("nllb-siglip-mrl_text") / "1"
    spec = spec_from_folder(TextSpec, folder)
    counters = Counters(lambda *_: None, {}, log=print, interval_s=60)

    def made(tower: Any, *, on_gpu: bool = False) -> TextFrontEnd:
        tokenizer = Tokenizer(folder / "tokenizer.json", spec.preprocessing)
        limits = TextLimits.on_gpu() if on_gpu else TextLimits()
        call = dataclasses.replace(spec.tower, on_gpu=on_gpu, max_batch_size=512 if on_gpu else 64)
        own = dataclasses.replace(spec, tower=call)
        return TextFrontEnd(own, limits, tokenizer, tower_from_call(tower), counters)

    yield made
    counters.close()


def counting_tower(inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
    """Vectors that say how many tokens their text had."""
    n_tokens = inputs["attention_mask"].sum(axis=1, keepdims=True)
    widths = {"vector": 192, "vector_32": 32, "vector_64": 64, "vector_128": 128}
    return [np.repeat(n_tokens, widths[name], axis=1).astype(np.float32) for name in outputs]


def request(*texts: bytes, language: bytes = b"pt", dim: int | None = None) -> TextRequest:
    column = np.array([[text] for text in texts], dtype=object)
    languages = np.array([[language]] * len(texts), dtype=object)
    return TextRequest(column, languages, None if dim is None else np.full((len(texts), 1), dim))


def test_each_request_fails_alone(front_end: Any) -> None:
    requests = [
        request(b"gato"),
        request(b"gato", b"\xff"),
        request(b"um gato preto e um gato branco", dim=64),
    ]
    first, second, third = front_end(counting_tower).answers(requests)
    assert isinstance(second, Failure)
    assert "text 1 is not UTF-8" in second.message
    assert first.vectors.shape == (1, 192)
    assert third.vectors.shape == (1, 64)
    assert third.vectors[0, 0] > first.vectors[0, 0]


@pytest.mark.parametrize(
    ("text", "language", "kind"),
    [(b"gato", b"xx-nowhere", LanguageError), (b"\xff", b"pt", InputError), (b" ", b"pt", InputError)],
)
def test_a_refusal_begins_with_the_class_that_is_raised_in_process(
    front_end: Any, text: bytes, language: bytes, kind: type[InputError]
) -> None:
    (failure,) = front_end(counting_tower).answers([request(text, language=language)])
    assert failure.code is Code.INVALID_ARG
    assert failure.message.startswith(f"{kind.__name__}: ")
    assert type(error_from_message(failure.message, place="Text 7")) is kind


def test_a_refused_image_is_let_go_of_at_once(exported: Exported) -> None:
    """Without a collection: an error in a cycle with its frames would keep 34 MB for minutes."""
    folder = exported("capivara").with_name("capivara_image") / "1"
    counters = Counters(lambda *_: None, {}, log=print, interval_s=60)
    front_end = ImageFrontEnd(
        spec_from_folder(ImageSpec, folder),
        ImageLimits(max_bytes=1000),
        tower_from_call(counting_tower),
        counters,
    )

    gc.disable()
    try:
        for image in (bytes(2000), b"no image at all"):
            column = np.empty((1, 1), dtype=object)
            column[0, 0] = image
            held = sys.getrefcount(image)
            (failure,) = front_end.answers([ImageRequest(column)])
            assert isinstance(failure, Failure)
            assert failure.message.startswith("ImageError: ")
            deadline = time.monotonic() + 5  # a decoding thread holds its last task for a moment
            while sys.getrefcount(image) > held and time.monotonic() < deadline:
                time.sleep(0.01)
            assert sys.getrefcount(image) == held
    finally:
        gc.enable()
    front_end.close()
    counters.close()


def test_refusals_come_through_whole() -> None:
    class LaterError(ImageError):
        """Of a server that is newer than the client."""

    for error, kind in ((ImageError("a: b"), ImageError), (LaterError("a: b"), ImageError)):
        read = error_from_message(message_from_error(error), place="Image 3")
        assert (type(read), str(read)) == (kind, "Image 3: a: b")
    own = error_from_message("unexpected shape for input 'text': [1]", place="Text 0")
    assert (type(own), str(own)) == (InputError, "Text 0: unexpected shape for input 'text': [1]")


def test_every_metric_of_the_dashboard_is_counted_and_every_count_is_shown() -> None:
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    named = set(re.findall(r"babeltower_\w+", " ".join(queries)))
    assert named == set(DESCRIPTIONS)


def test_a_failing_tower_fails_the_texts_of_its_bucket_only(front_end: Any) -> None:
    def short_only(inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        if inputs["input_ids"].shape[1] > 30:
            raise TowerError("too long")
        return counting_tower(inputs, outputs)

    long = request(b"gato " * 60)
    answers = front_end(short_only).answers([request(b"gato"), long])
    assert isinstance(answers[0], AnswerVectors)
    assert isinstance(answers[1], Failure)
    assert answers[1].message == "too long"


def test_texts_for_a_gpu_are_padded_to_shapes_of_buckets(front_end: Any) -> None:
    shapes: list[tuple[int, int]] = []

    def noting(inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert ids.shape == mask.shape
        assert mask.any(axis=1).all()  # rows that only fill a shape are texts too
        shapes.append(ids.shape)
        return counting_tower(inputs, outputs)

    requests = [request(b"gato " * (1 + i % 40), dim=64 if i % 3 else None) for i in range(90)]
    on_gpu = front_end(noting, on_gpu=True)
    answers = on_gpu.answers(requests)
    buckets = text_buckets(on_gpu._spec.preprocessing.context_length, max_rows=512)
    assert set(shapes) <= set(buckets.shapes)
    expected = front_end(counting_tower).answers(requests)
    for answer, other in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer.vectors, other.vectors)
    shapes.clear()
    (one,) = on_gpu.answers([request(b"um gato preto")])
    assert one.vectors.shape == (1, 192)
    assert shapes == [(1, buckets.lengths[0])]


def test_images_for_a_gpu_are_padded_to_rows_of_buckets(exported: Exported) -> None:
    folder = exported("capivara").with_name("capivara_image") / "1"
    spec = spec_from_folder(ImageSpec, folder)
    spec = dataclasses.replace(spec, tower=dataclasses.replace(spec.tower, on_gpu=True, max_batch_size=8))
    rows: list[int] = []

    def noting(inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        rows.append(len(inputs["pixels"]))
        means = inputs["pixels"].mean(axis=(1, 2, 3), keepdims=True)[:, :, 0, 0]
        return [np.repeat(means, spec.tower.dim, axis=1).astype(np.float32) for _ in outputs]

    counters = Counters(lambda *_: None, {}, log=print, interval_s=60)
    front_end = ImageFrontEnd(spec, ImageLimits(), tower_from_call(noting), counters)
    column = np.empty((15, 1), dtype=object)
    for shade in range(15):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (10 * shade,) * 3).save(file, "PNG")
        column[shade, 0] = file.getvalue()
    (answer,) = front_end.answers([ImageRequest(column)])
    assert isinstance(answer, AnswerVectors)
    assert answer.vectors[:, 0].tolist() == [10.0 * shade for shade in range(15)]
    assert rows == [8, 8]
    front_end.close()
    counters.close()


def test_front_ends_of_a_gpu_variant_say_so(exported: Exported, tmp_path: Path) -> None:
    model = repository_for_cuda(exported("capivara"), tmp_path / "r")
    text, image = frontends_from_model(model, variant="fp16_cuda", settings=FrontEndSettings(instances=1))
    for folder, kind in ((text, TextSpec), (image, ImageSpec)):
        assert spec_from_folder(kind, folder / "1").tower.on_gpu
        parameters = config_of_folder(folder).parameters
        assert parameters["babeltower_engine"].string_value == "cuda"
        assert parameters["babeltower_variant"].string_value == "fp16_cuda"
    config = config_of_folder(text)
    assert config.max_batch_size == 512
    assert config.parameters["babeltower_token_budget"].string_value == "16384"
    assert (text / "1" / "runtime" / "preprocessing" / "buckets.py").is_file()
    frontends_from_model(model, variant="fp32")
    assert not spec_from_folder(TextSpec, text / "1").tower.on_gpu
    assert config_of_folder(text).parameters["babeltower_token_budget"].string_value == "2048"


def test_vectors_that_are_not_finite_are_an_error(front_end: Any) -> None:
    def broken(inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        return [np.full((len(inputs["input_ids"]), 192), np.nan, np.float32) for _ in outputs]

    (answer,) = front_end(broken).answers([request(b"gato")])
    assert "not finite" in answer.message


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_limits_are_whole_numbers(value: str) -> None:
    with pytest.raises(ManifestError, match="babeltower_max_pixels"):
        limits_from_parameters(ImageLimits, {"babeltower_max_pixels": {"string_value": value}})


@pytest.mark.parametrize("name", NAMES)
def test_front_ends_parse_and_carry_their_code(name: str, exported: Exported) -> None:
    model = exported(name)
    manifest = Manifest.read(model)
    manifest.verify_front_ends(model.parent)
    (front_ends,) = manifest.front_ends
    tower = manifest.variant(Precision.FP32)
    for folder, files in ((front_ends.text, tower.text), (front_ends.image, tower.image)):
        text = (model.parent / folder / "config.pbtxt").read_text()
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        assert config.parameters["babeltower_tower"].string_value == files.model
        assert config.dynamic_batching.default_queue_policy.max_queue_size == 1024
        assert {i.name: i.optional for i in config.input}["dim"]
        for module in (model.parent / folder / "1").rglob("*.py"):
            ast.parse(module.read_text())


def test_front_ends_import_without_the_project(exported: Exported) -> None:
    folder = exported("capivara").with_name("capivara_image") / "1"
    code = "import runtime.preprocessing.image, triton_models.image_frontend as f; print(f.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(folder / "triton_models" / "image_frontend.py")


def test_the_code_of_a_model_is_what_it_imports(exported: Exported) -> None:
    code = code_of_module(exported("capivara").with_name("capivara_text") / "1" / "model.py")
    data = {"runtime/preprocessing/languages.csv", "runtime/preprocessing/language_tags.json"}
    assert {
        "runtime/preprocessing/text.py",
        "runtime/preprocessing/language_tags.py",
        "runtime/preprocessing/batching.py",
    } | data <= set(code)
    assert not [file for file in code if "image" in file or "server" in file or "encoder" in file]


def test_writing_front_ends_again_replaces_them(exported: Exported, tmp_path: Path) -> None:
    import shutil

    model = Path(shutil.copytree(exported("capivara").parent, tmp_path / "r")) / "capivara"
    settings = FrontEndSettings(instances=3, text=TextLimits(token_budget=512))
    text, _ = frontends_from_model(model, settings=settings)
    config = text_format.Parse((text / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.instance_group[0].count == 3
    assert not config.HasField("response_cache")  # Triton's keeps refusals as empty answers
    assert config.parameters["babeltower_token_budget"].string_value == "512"
    Manifest.read(model).verify_front_ends(model.parent)
    with pytest.raises(ManifestError, match="no variant 'int4'"):
        frontends_from_model(model, variant="int4")
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_towers_are_resettled_with_their_front_ends(exported: Exported, tmp_path: Path) -> None:
    import shutil

    model = Path(shutil.copytree(exported("capivara").parent, tmp_path / "r")) / "capivara"
    arguments = ["frontends", str(model), "--tower-instances", "2", "--tower-threads", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    manifest = Manifest.read(model)
    variant = manifest.variant(Precision.FP32)
    manifest.verify(model.parent, variant)
    for tower in (variant.text, variant.image):
        config = require_accepted(model.parent / tower.model)
        assert config.instance_group[0].count == 2
        assert config.parameters["intra_op_thread_count"].string_value == "1"
    with pytest.raises(ExportError, match="pass the threads of each"):
        frontends_from_model(model, towers=TowerSettings(instances=2))
    assert Manifest.read(model) == manifest


def test_serve_runs_until_it_is_told_to_stop(
    exported: Exported, server_environment: ServerEnvironment
) -> None:
    command = [sys.executable, "-m", "babeltower", "serve", str(exported("capivara").parent)]
    options = [
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--metrics-port",
        "0",
        "--env",
        str(server_environment.folder),
    ]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("metrics"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 0
    assert children
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_a_broken_model_is_reported_in_the_servers_words(
    exported: Exported, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    import shutil

    tower = "capivara_text_tower_fp32"
    shutil.copytree(exported("capivara").with_name(tower), tmp_path / tower)
    config = tmp_path / tower / "config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_FP32", "TYPE_FP16"))
    options = ServerOptions(ready_s=60)
    with (
        pytest.raises(EngineError, match=r"config.pbtxt has output"),
        running_server(tmp_path, environment=server_environment, options=options),
    ):
        pass


def test_a_taken_port_is_named(served: Server, server_environment: ServerEnvironment, tmp_path: Path) -> None:
    port = int(served.addresses.http.rpartition(":")[2])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.pbtxt").touch()
    with (
        pytest.raises(EngineError, match=f"Port {port}"),
        running_server(tmp_path, environment=server_environment, options=ServerOptions(http_port=port)),
    ):
        pass
