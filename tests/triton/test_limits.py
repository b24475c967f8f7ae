"""Requests that ask for much work with few bytes: refused before memory or time is spent on them."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from numpy.typing import NDArray
from PIL import Image
from processes import memory_bytes
from raw_client import bytes_column, infer
from sample_models import Exported
from tower_double import tower_from_call
from tritonclient.utils import InferenceServerException

from runtime.errors import InputError
from runtime.manifest import Engine
from runtime.server import Server, ServerEnvironment, running_server
from triton_models.answers import Code, Failure
from triton_models.counters import Counters
from triton_models.image_frontend import ImageFrontEnd, ImageRequest
from triton_models.spec import ImageLimits, ImageSpec, TextLimits, spec_from_folder
from triton_models.tower import tower_config_from_triton

NAME = "capivara"
MOST_BYTES = 64_000_000
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%Pages: 1\n%%EndComments\nshowpage\n"


def png(size: tuple[int, int], mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def traced(
    exported: Exported, server_environment: ServerEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    """A server on whose PATH is a Ghostscript that leaves a trace."""
    programs = tmp_path_factory.mktemp("programs")
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {programs}/ran\nexit 1\n")
    (programs / "gs").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        with running_server(exported(NAME).parent, environment=server_environment) as server:
            yield server, programs / "ran"


Tensors = dict[str, NDArray[Any]]


def ids(rows: int, length: int, value: int = 1) -> NDArray[np.int64]:
    return np.full((rows, length), value, np.int64)


TOO_MUCH: dict[str, tuple[str, Callable[[], Tensors], str]] = {
    "320 kB of token ids": (
        f"{NAME}_text_tower_fp32",
        lambda: {"input_ids": ids(1, 40_000), "attention_mask": ids(1, 40_000)},
        r"shape \[1, 40000\]; the tower takes 1 to 77 tokens",
    ),
    "no token ids": (
        f"{NAME}_text_tower_fp32",
        lambda: {"input_ids": ids(1, 0), "attention_mask": ids(1, 0)},
        r"the tower takes 1 to 77 tokens",
    ),
    "another mask": (
        f"{NAME}_text_tower_fp32",
        lambda: {"input_ids": ids(1, 8), "attention_mask": ids(1, 9)},
        "expected equal rows and lengths",
    ),
    "negative ids": (
        f"{NAME}_text_tower_fp32",
        lambda: {"input_ids": ids(1, 8, -1), "attention_mask": ids(1, 8)},
        "has negative values",
    ),
    "ids of no token": (
        f"{NAME}_text_tower_fp32",
        lambda: {"input_ids": ids(1, 8, 1 << 40), "attention_mask": ids(1, 8)},
        r"^(?!.*(model\.onnx|/)).*token id is over [0-9]+, the highest of the tower's vocabulary",
    ),
    "a mask of nothing": (
        f"{NAME}_text_tower_fp32",
        lambda: {"input_ids": ids(2, 8), "attention_mask": np.vstack([ids(1, 8), ids(1, 8, 0)])},
        "attention_mask has other values than 0 and 1, or a row without a 1",
    ),
    "a mask of 2": (
        f"{NAME}_text_tower_fp32",
        lambda: {"input_ids": ids(1, 8), "attention_mask": ids(1, 8, 2)},
        "attention_mask has other values than 0 and 1",
    ),
    "long thin images": (
        f"{NAME}_image",
        lambda: {"image": bytes_column([png((1, 32_000))] * 64)},
        "over the limit of 16777216 pixels",
    ),
    "long flat images": (
        f"{NAME}_image",
        lambda: {"image": bytes_column([png((32_000, 1))] * 64)},
        "over the limit of 16777216 pixels",
    ),
    "many thin images": (
        f"{NAME}_image",
        lambda: {"image": bytes_column([png((1, 3_000))] * 64)},
        "Send fewer images in a request",
    ),
    "many blank images": (
        f"{NAME}_image",
        lambda: {"image": bytes_column([png((4_000, 3_000))] * 16)},
        "Send fewer images in a request",
    ),
    "EPS": (f"{NAME}_image", lambda: {"image": bytes_column([EPS])}, "it is EPS or PostScript"),
    "large images": (
        f"{NAME}_image",
        lambda: {"image": bytes_column([png((6_000, 6_000))])},
        "6000×6000 = 36000000 pixels; the limit is 33554432",
    ),
    "values that Pillow reads one by one": (
        f"{NAME}_image",
        lambda: {"image": bytes_column([b"P5 2000 1000 254\n" + bytes(2_000_000)])},
        "PNM of 2000017 bytes with values up to 254",
    ),
    "ligatures": (
        f"{NAME}_text",
        lambda: {"text": bytes_column(["\ufdfa" * 16_384] * 32)},
        "9437184 characters, with ligatures and the like written out; the limit is 524288",
    ),
    "many long texts": (
        f"{NAME}_text",
        lambda: {"text": bytes_column(["x y " * 4_096] * 64)},
        "1048576 characters, .* the limit is 524288",
    ),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_much_work_for_few_bytes_is_refused(what: str, traced: tuple[Server, Path]) -> None:
    server, ran = traced
    model, tensors, reason = TOO_MUCH[what]
    client = tritonclient.grpc.InferenceServerClient(server.addresses.grpc)
    for _ in range(2):  # the second time, nothing is new
        before = memory_bytes(server.pid)
        with pytest.raises(InferenceServerException, match=reason) as failure:
            infer(client, tritonclient.grpc, model, tensors())
        assert failure.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert memory_bytes(server.pid) - before < MOST_BYTES
    assert not ran.exists()


def test_what_a_tower_and_a_front_end_take_is_answered(traced: tuple[Server, Path]) -> None:
    server, _ = traced
    client = tritonclient.grpc.InferenceServerClient(server.addresses.grpc)
    most = {"input_ids": ids(64, 77), "attention_mask": ids(64, 77)}
    assert len(infer(client, tritonclient.grpc, f"{NAME}_text_tower_fp32", most).as_numpy("vector")) == 64
    for files in ([png((5_700, 5_700))], [png((1, 3_000))], [png((1_000, 1_000))] * 32):
        answer = infer(client, tritonclient.grpc, f"{NAME}_image", {"image": bytes_column(files)})
        assert len(answer.as_numpy("vector")) == len(files)


def test_images_whose_sender_left_are_not_decoded(traced: tuple[Server, Path]) -> None:
    server, _ = traced
    client = tritonclient.grpc.InferenceServerClient(server.addresses.grpc)
    files = bytes_column([png((3_000, 2_000), "RGB")] * 11)
    tensor = tritonclient.grpc.InferInput("image", list(files.shape), "BYTES")
    tensor.set_data_from_numpy(files)
    deadline = time.monotonic() + 120
    attempt = 0
    while 'reason="cancelled"' not in server.metrics():  # counters are published every five seconds
        assert time.monotonic() < deadline
        answered = threading.Event()
        call = client.async_infer(f"{NAME}_image", [tensor], lambda *_, done=answered: done.set())
        answered.wait(0.05 * (1 + attempt % 20))  # the sender leaves while its images are decoded
        call.cancel()
        attempt += 1


def test_decoding_stops_when_the_sender_leaves(exported: Exported) -> None:
    folder = exported(NAME).with_name(f"{NAME}_image") / "1"
    counters = Counters(lambda *_: None, {}, log=print, interval_s=60)
    left = iter([False, False])
    asked: list[bool] = []

    def is_cancelled() -> bool:
        asked.append(next(left, True))
        return asked[-1]

    def tower(*_: Any) -> list[NDArray[Any]]:
        raise AssertionError("a request without a sender reached the tower")

    front_end = ImageFrontEnd(
        spec_from_folder(ImageSpec, folder), ImageLimits(decode_threads=1), tower_from_call(tower), counters
    )
    request = ImageRequest(bytes_column([png((1_200, 1_000))] * 5), is_cancelled=is_cancelled)
    (answer,) = front_end.answers([request])
    assert isinstance(answer, Failure)
    assert answer.code is Code.CANCELLED
    assert asked == [False, False, True, True, True]
    front_end.close()
    counters.close()


@pytest.mark.parametrize("batched", [True, False])
def test_a_tower_bounds_its_rows_whoever_batches(batched: bool) -> None:
    whole = [] if batched else [-1]
    tokens = [{"name": n, "data_type": "TYPE_INT64", "dims": [*whole, -1]} for n in ("input_ids", "mask")]
    vector = [{"name": "vector", "data_type": "TYPE_FP32", "dims": [*whole, 8]}]
    config = {
        "name": "a_text_tower_fp32", "default_model_filename": "model.onnx", "input": tokens,
        "output": vector, "max_batch_size": 16 if batched else 0,
        "parameters": {
            "babeltower_max_rows": {"string_value": "16"},
            "babeltower_context_length": {"string_value": "32"},
            "babeltower_vocabulary_size": {"string_value": "9"},
        },
    }  # fmt: skip
    tower = tower_config_from_triton(json.dumps(config), Engine.OPENVINO)
    tower.require_bounded({"input_ids": ids(16, 32), "mask": ids(16, 32)})
    for rows, length in ((17, 32), (0, 32), (16, 33)):
        with pytest.raises(InputError, match=r"expected 1 to 16|takes 1 to 32 tokens"):
            tower.require_bounded({"input_ids": ids(rows, length), "mask": ids(rows, length)})
    tower.require_bounded({"input_ids": ids(1, 4, 8), "mask": ids(1, 4)})
    with pytest.raises(InputError, match="A token id is over 8, the highest of the tower's vocabulary"):
        tower.require_bounded({"input_ids": ids(1, 4, 9), "mask": ids(1, 4)})


def test_an_export_writes_the_bounds_of_its_towers(exported: Exported) -> None:
    for modality, length in (("text", "77"), ("image", None)):
        folder = exported(NAME).with_name(f"{NAME}_{modality}_tower_fp32")
        text = (folder / "config.pbtxt").read_text()
        assert 'key: "babeltower_max_rows"' in text
        assert ('key: "babeltower_context_length"' in text) == (length is not None)
        assert ('key: "babeltower_vocabulary_size"' in text) == (length is not None)


def test_the_largest_request_of_our_client_is_within_the_limits() -> None:
    from runtime.remote import Connection

    limits = TextLimits()
    assert Connection().texts_per_request * limits.max_characters <= limits.max_request_characters
