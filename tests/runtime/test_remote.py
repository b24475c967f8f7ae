"""The client against a server that is lost, refuses, or becomes another one, on purpose."""

from __future__ import annotations

import io
import itertools
import logging
import random
import sys
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from PIL import Image, ImageSequence
from server_double import DIM, NARROW, Double, Running, vector_of

from export.parity.probes import probe_images
from runtime import Classifier, Encoder, Index
from runtime.errors import (
    BabeltowerError,
    EngineError,
    ImageError,
    InputError,
    LanguageError,
    ServerError,
    UnansweredError,
)
from runtime.remote import Connection, address_from_text
from runtime.remote.calls import delays_s
from runtime.remote.payloads import bytes_from_image


@pytest.fixture
def server() -> Iterator[Running]:
    running = Running(Double())
    yield running
    running.kill()


def texts(n: int) -> list[str]:
    return [f"gato {i} 猫" for i in range(n)]


def expected(items: list[str], dim: int = DIM) -> np.ndarray:
    return np.stack([vector_of(item.encode(), dim) for item in items])


@pytest.mark.parametrize("n", [0, 1, 7, 500])
def test_texts_come_back_in_order(server: Running, n: int) -> None:
    with Encoder.open(server.address) as encoder:
        vectors = encoder.embed_texts(texts(n), "por_Latn")
        assert vectors.shape == (n, DIM)
        assert not n or np.array_equal(vectors, expected(texts(n)))
        assert encoder.stats.texts == n
    assert all(size <= 8 for size in server.double.batches)


def test_widths_and_encodings(server: Running) -> None:
    with Encoder.open(server.address) as encoder:
        assert (encoder.dims, encoder.dim, encoder.name) == ((NARROW, DIM), DIM, "double")
        assert np.array_equal(encoder.embed_texts(texts(3), dim=NARROW), expected(texts(3), NARROW))
        assert encoder.embed_texts(texts(3), encoding="int8").dtype == np.int8
        assert encoder.embed_texts(texts(3), encoding="binary").shape == (3, 2)
        with pytest.raises(InputError, match="has no vectors of width 5"):
            encoder.embed_texts(texts(3), dim=5)


def test_a_stream_is_read_no_further_than_needed(server: Running) -> None:
    read = []

    def endless() -> Iterator[str]:
        for i in itertools.count():
            read.append(i)
            yield f"text {i}"

    connection = Connection(concurrency=2, texts_per_request=4)
    with Encoder.open(server.address, connection=connection) as encoder:
        parts = encoder.iter_texts(endless())
        first = next(parts)
        parts.close()
    assert np.array_equal(first, expected([f"text {i}" for i in range(4)]))
    assert len(read) <= 4 * 2 * 2
    assert server.double.most_in_flight <= 2


def test_concurrency_is_bounded_for_all_threads_together(server: Running) -> None:
    with Encoder.open(server.address, connection=Connection(concurrency=3, texts_per_request=1)) as encoder:
        workers = [threading.Thread(target=encoder.embed_texts, args=(texts(40),)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert encoder.stats.texts == 160
    assert server.double.most_in_flight <= 3


def test_headers_and_token_go_with_every_request(server: Running) -> None:
    connection = Connection(token="secret", headers={"X-Team": "search"})
    with Encoder.open(server.address, connection=connection) as encoder:
        encoder.embed_texts(texts(1))
    assert server.double.metadata[-1]["authorization"] == "Bearer secret"
    assert server.double.metadata[-1]["x-team"] == "search"
    assert "secret" not in repr(connection)


def test_unavailable_is_tried_again_and_nothing_else(server: Running) -> None:
    with Encoder.open(server.address) as encoder:
        server.double.fail_next = [grpc.StatusCode.UNAVAILABLE] * 2
        assert np.array_equal(encoder.embed_texts(texts(2)), expected(texts(2)))
        server.double.fail_next = [grpc.StatusCode.INTERNAL]
        with pytest.raises(ServerError, match="as the test asked"):
            encoder.embed_texts(texts(2))
        assert np.array_equal(encoder.embed_texts(texts(2)), expected(texts(2)))


def test_delays_double_up_to_a_limit() -> None:
    delays = list(itertools.islice(delays_s(random.Random(0)), 12))
    full = [min(0.05 * 2**i, 2.0) for i in range(12)]
    assert all(whole / 2 <= delay <= whole for delay, whole in zip(delays, full, strict=True))


def test_a_lost_server_leaves_a_list_of_what_has_no_answer(server: Running) -> None:
    connection = Connection(concurrency=2, texts_per_request=4, retry_for_s=0.2)
    with Encoder.open(server.address, connection=connection) as encoder:
        server.double.die_after = 5
        with pytest.raises(UnansweredError) as caught:
            encoder.embed_texts(texts(100))
        error = caught.value
        assert sorted((*error.answered, *error.unanswered)) == list(range(100))
        assert len(error.answered) == 20
        all_texts = texts(100)
        assert np.array_equal(error.vectors, expected([all_texts[i] for i in error.answered]))
        server.double.die_after = None
        rest = encoder.embed_texts([all_texts[i] for i in error.unanswered])
        assert np.array_equal(rest, expected([all_texts[i] for i in error.unanswered]))


def test_a_restarted_server_is_found_again(server: Running) -> None:
    connection = Connection(concurrency=4, texts_per_request=2, retry_for_s=20)
    with Encoder.open(server.address, connection=connection) as encoder:
        parts = encoder.iter_texts(texts(400))
        got = [next(parts)]
        server.kill()
        threading.Timer(0.7, server.start).start()
        got += parts
        assert np.array_equal(np.concatenate(got), expected(texts(400)))


def test_an_outage_and_its_end_are_logged_once(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with Encoder.open(server.address) as encoder, caplog.at_level(logging.INFO, "babeltower"):
        encoder.embed_texts(texts(2))
        assert not caplog.messages
        server.double.fail_next = [grpc.StatusCode.UNAVAILABLE] * 2
        encoder.embed_texts(texts(2))
        server.double.version = "2"
        encoder.embed_texts(texts(1))
    away, back, version = caplog.messages
    assert "is not available (as the test asked); requests are repeated for up to" in away
    assert "answers again after 0." in back
    assert version.endswith("double_text answers with version 2, before with 1")


def test_another_space_after_a_restart_is_an_error(server: Running) -> None:
    with Encoder.open(server.address) as encoder:
        server.kill()
        server.double.fingerprints = {"text": "bt1:b", "image": "bt1:b"}
        server.start()
        with pytest.raises(ServerError, match=r"'bt1:b'; expected 'bt1:a'"):
            encoder.embed_texts(texts(1))


def test_a_release_of_another_space_is_an_error(server: Running) -> None:
    with Encoder.open(server.address) as encoder:
        encoder.embed_texts(texts(1))
        server.double.version = "2"
        assert np.array_equal(encoder.embed_texts(texts(1)), expected(texts(1)))
        server.double.version = "3"
        server.double.fingerprints = {"text": "bt1:b", "image": "bt1:b"}
        with pytest.raises(ServerError, match="bt1:b"):
            encoder.embed_texts(texts(1))


def test_a_refusal_names_its_place_and_is_the_error_of_in_process(server: Running) -> None:
    with Encoder.open(server.address) as encoder:
        with pytest.raises(LanguageError, match=r"^Text 11: Language 'tlh' is unknown"):
            encoder.embed_texts([*texts(11), "klingon", "after"])
        with pytest.raises(ImageError, match=r"^Image 2: its format is unknown"):
            encoder.embed_images([b"one", b"two", b"broken", b"four"])
        with pytest.raises(InputError, match="Text 1 is of type int"):
            encoder.embed_texts(["one", 2])  # type: ignore[list-item]


def test_an_answer_of_another_type_is_not_believed(server: Running) -> None:
    with Encoder.open(server.address) as encoder:
        server.double.dtype = np.float64
        with pytest.raises(ServerError, match="expected FP32"):
            encoder.embed_texts(texts(2))


def test_what_is_served_must_be_what_was_asked_for(server: Running) -> None:
    address = server.address
    Encoder.open(address, engine="onnxruntime", precision="fp32").close()
    with pytest.raises(EngineError, match="'int8' was requested; the server runs double in fp32 on onnxr"):
        Encoder.open(address, precision="int8")
    with pytest.raises(EngineError, match="'openvino' was requested"):
        Encoder.open(address, engine="openvino")
    with pytest.raises(ServerError, match="expected 'bt1:z'"):
        Encoder.open(address, connection=Connection(fingerprint="bt1:z"))
    with pytest.raises(ServerError, match="does not serve this model"):
        Encoder.open(address.replace("/double", "/other"))
    with pytest.raises(InputError, match="gopher"):
        Encoder.open("gopher://host/name", threads=1)
    with pytest.raises(InputError, match="threads is set on the server"):
        Encoder.open(address, threads=2)
    server.double.fingerprints["image"] = "bt1:b"
    with pytest.raises(ServerError, match="disagree"):
        Encoder.open(address)


def test_no_server_is_said_at_once() -> None:
    with pytest.raises(ServerError, match=r"grpc://127\.0\.0\.1:1/x is not available"):
        Encoder.open("grpc://127.0.0.1:1/x")
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:1/x is not available"):
        Encoder.open("http://127.0.0.1:1/x")


def test_a_closed_encoder_says_so(server: Running) -> None:
    encoder = Encoder.open(server.address)
    encoder.close()
    encoder.close()
    with pytest.raises(EngineError, match="closed"):
        encoder.embed_texts(texts(1))


def test_frames_of_one_image_are_sent_each_and_counted_when_the_server_is_lost(server: Running) -> None:
    file = io.BytesIO()
    first, *others = [Image.new("RGB", (9, 9), (i * 20, 0, 0)) for i in range(12)]
    first.save(file, "WEBP", save_all=True, append_images=others, lossless=True)
    alone = [frame.copy() for frame in ImageSequence.Iterator(Image.open(file))]
    sent = [vector_of(bytes_from_image(frame, name="0")) for frame in alone]
    with Encoder.open(server.address, connection=Connection(concurrency=1, retry_for_s=0.2)) as encoder:
        assert np.array_equal(
            encoder.embed_images(ImageSequence.Iterator(Image.open(file)), batch_size=2), np.stack(sent)
        )
        server.double.die_after = len(server.double.batches) + 2
        with pytest.raises(UnansweredError) as lost:
            encoder.embed_images(ImageSequence.Iterator(Image.open(file)), batch_size=2)
    assert sorted([*lost.value.answered, *lost.value.unanswered]) == list(range(12))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            grpc.StatusCode.UNIMPLEMENTED,
            "Client shared memory is disabled. Start the server with …",
        ),
        (grpc.StatusCode.INTERNAL, "Unable to open shared memory region: '/babeltower-7-0'"),
        (grpc.StatusCode.INVALID_ARGUMENT, "Failed to register shared memory region"),
    ],
)
def test_a_server_without_shared_memory_is_refused_with_the_remedy(
    server: Running, status: grpc.StatusCode, message: str
) -> None:
    """Triton's own words: disabled by default from 26.04 on; a container's /dev/shm is its own."""
    server.double.shared_memory_error = (status, message)
    with pytest.raises(ServerError) as caught:
        Encoder.open(server.address, connection=Connection(shared_memory=True))
    assert f"does not take shared memory: {message}" in str(caught.value)
    for remedy in ("--allow-client-shm=true", "/dev/shm", "shared_memory=False"):
        assert remedy in str(caught.value)
    server.double.shared_memory_error = None
    with Encoder.open(server.address, connection=Connection(shared_memory=True)) as encoder:
        server.kill()
        server.double.regions.clear()
        server.double.shared_memory_error = (status, message)
        server.start()
        with pytest.raises(ServerError, match="does not take shared memory"):
            encoder.embed_images([b"a", b"b"])


def test_images_through_shared_memory(server: Running) -> None:
    images = [bytes([i]) * (1000 + i) for i in range(50)]
    with Encoder.open(server.address, connection=Connection(shared_memory=True, concurrency=3)) as encoder:
        vectors = encoder.embed_images(images, batch_size=4)
        assert np.array_equal(vectors, np.stack([vector_of(image) for image in images]))
        assert 1 <= len(server.double.regions) <= 3
        server.kill()
        server.double.regions.clear()
        server.start()
        assert np.array_equal(encoder.embed_images(images[:3]), vectors[:3])
        server.double.regions.clear()  # restarted while the connection was idle, which does not show it
        assert np.array_equal(encoder.embed_images(images[:3]), vectors[:3])
    assert not server.double.regions


@pytest.mark.parametrize("image", probe_images(), ids=lambda image: image.mode)
def test_decoded_pixels_travel_without_loss(image: Image.Image) -> None:
    read = Image.open(io.BytesIO(bytes_from_image(image, name="0")))
    assert (read.mode, read.tobytes()) == (image.mode, image.tobytes())


def test_classifier_and_index_work_on_a_server(server: Running) -> None:
    with Encoder.open(server.address) as encoder:
        classifier = Classifier.from_labels(encoder, ["gato", "cão"], language="por_Latn")
        ((best, _),) = classifier.classify([b"image"])
        assert best.label in ("gato", "cão")
        vectors = encoder.embed_texts(texts(5))
        index = Index(tuple(texts(5)), vectors, encoder.fingerprint)
        assert index.search(vectors[2:3], fingerprint=encoder.fingerprint, k=1)[0][0].id == texts(5)[2]


@pytest.mark.parametrize(
    ("text", "target", "tls", "name"),
    [
        ("grpc://host:1/nllb", "host:1", False, "nllb"),
        ("grpcs://host/nllb", "host:8001", True, "nllb"),
        ("http://[::1]/nllb", "[::1]:8000", False, "nllb"),
        ("https://host/triton/nllb", "host:443/triton", True, "nllb"),
    ],
)
def test_addresses(text: str, target: str, tls: bool, name: str) -> None:
    address = address_from_text(text)
    assert (address.target, address.tls, address.name) == (target, tls, name)


@pytest.mark.parametrize(
    "text",
    [
        "ftp://host/x",
        "grpc://host",
        "grpc:///x",
        "grpc://h/a/b",
        "http://u:p@h/x",
        "grpc://h:99999/x",
        "grpc://h/é",
    ],
)
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(InputError):
        address_from_text(text)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": 0},
        {"retry_for_s": -1},
        {"concurrency": 0},
        {"ca_file": "/does/not/exist"},
        {"certificate_file": __file__},
    ],
)
def test_wrong_connection_options(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Connection(**options)  # type: ignore[arg-type]


def test_options_must_fit_the_address(server: Running) -> None:
    with pytest.raises(InputError, match="grpcs://"):
        Encoder.open(server.address, connection=Connection(ca_file=__file__))
    with pytest.raises(InputError, match="not this machine"):
        Encoder.open("grpc://example.org/x", connection=Connection(shared_memory=True))


def test_the_client_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(BabeltowerError, match=r"pip install 'babeltower\[client\]'"):
        Encoder.open("grpc://127.0.0.1:1/x")
