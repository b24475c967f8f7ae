"""The largest requests that `babeltower serve` takes by default: bounded memory in all its processes."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from altered_models import copied
from PIL import Image
from processes import peak_of_processes
from sample_models import Exported
from serving import Serving, wait_until

from runtime import Encoder
from runtime.gateway.options import GatewayOptions
from runtime.preprocessing.served_limits import SERVED_BYTES
from runtime.server import ServerEnvironment

NAME = "capivara"
MOST_BYTES = 64_000_000
PORTS = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")
TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture(scope="module", params=[True, False], ids=["token", "no token"])
def client(
    request: pytest.FixtureRequest,
    exported: Exported,
    server_environment: ServerEnvironment,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[httpx.Client, int]]:
    """A client of `serve`, and the process's id."""
    repository = copied(exported(NAME), tmp_path_factory.mktemp("one") / "models").parent
    arguments, headers = [*PORTS, "--http-api"], {}
    if request.param:
        (file := repository.parent / "token").write_text(TOKEN)
        arguments += ["--token-file", str(file)]
        headers = {"authorization": f"Bearer {TOKEN}"}
    with Serving(repository, server_environment, *arguments) as serving:
        serving.wait_until_served()
        url = serving.address("http")
        with httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False) as client:
            for _ in range(4):  # both front ends have decoded an image before anything is measured
                embedded(client, photograph(3_000, 2_000, "JPEG"))
            yield client, serving.process.pid


def photograph(width: int, height: int, kind: str, mode: str = "RGB", **options: object) -> bytes:
    """A smooth image, which is small as a file."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    (image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def blank(width: int, height: int, kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind)
    return file.getvalue()


def padded(file: bytes, n_bytes: int) -> bytes:
    """A PNG with a chunk that nobody reads."""
    content = b"teSt" + os.urandom(n_bytes - len(file) - 12)
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return file[:33] + chunk + file[33:]


def body_of(*files: bytes) -> bytes:
    images = [{"image": base64.b64encode(file).decode()} for file in files]
    return json.dumps({"model": NAME, "input": images, "encoding_format": "base64"}).encode()


def embedded(client: httpx.Client, *files: bytes) -> np.ndarray:
    answer = client.post("/v1/embeddings", content=body_of(*files))
    assert answer.status_code == 200, answer.text
    vectors = [base64.b64decode(row["embedding"]) for row in answer.json()["data"]]
    return np.frombuffer(b"".join(vectors), "<f4").reshape(len(files), -1)


LARGEST: dict[str, Callable[[], list[bytes]]] = {
    "a file of the limit": lambda: [padded(blank(64, 64, "PNG"), SERVED_BYTES)],
    "files of the limit": lambda: [padded(blank(64, 64, "PNG"), SERVED_BYTES // 12)] * 12,
    "a photograph of a camera": lambda: [photograph(6_000, 4_000, "JPEG", quality=90)],
    "of a phone": lambda: [photograph(3_024, 4_032, "JPEG", quality=92)],
    "progressive": lambda: [photograph(4_032, 3_024, "JPEG", progressive=True)],
    "a blank page": lambda: [blank(5_700, 5_700, "PNG")],
    "with transparency": lambda: [blank(5_000, 5_000, "PNG", "RGBA")],
    "high": lambda: [blank(2_000, 6_900, "PNG")],
    "of 16 bits": lambda: [blank(5_200, 5_200, "PNG", "I;16")],
    "an animation": lambda: [blank(5_700, 5_700, "GIF", "P")],
    "WebP": lambda: [photograph(1_820, 1_820, "WEBP", method=0)],
    "several WebP": lambda: [photograph(1_700, 1_700, "WEBP", method=0)] * 9,
}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("what", LARGEST)
def test_the_largest_requests_take_bounded_memory(
    what: str, client: tuple[httpx.Client, int], exported: Exported
) -> None:
    asked, pid = client
    files = LARGEST[what]()
    assert len(body_of(*files)) <= GatewayOptions().max_image_json_bytes
    with Encoder.open(exported(NAME), threads=1) as encoder:
        expected = encoder.embed_images(files)
    with peak_of_processes(pid) as memory:
        found = embedded(asked, *files)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert memory[-1] - memory[0] <= MOST_BYTES


TOO_LARGE: dict[str, Callable[[], list[bytes]]] = {
    "a larger file": lambda: [padded(blank(64, 64, "PNG"), SERVED_BYTES + 100_000)],
    "too many": lambda: [padded(blank(64, 64, "PNG"), SERVED_BYTES // 4)] * 5,
    "a large WebP": lambda: [blank(6_000, 4_000, "WEBP")],
    "a large AVIF": lambda: [blank(4_000, 4_000, "AVIF")],
    "a high image": lambda: [blank(2_000, 9_000, "PNG")],
    "a large progressive JPEG": lambda: [photograph(5_700, 5_700, "JPEG", progressive=True)],
    "16 bits": lambda: [blank(5_700, 5_700, "PNG", "I;16")],
}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("what", TOO_LARGE)
def test_larger_ones_are_refused_in_bounded_memory(what: str, client: tuple[httpx.Client, int]) -> None:
    asked, pid = client
    body = body_of(*TOO_LARGE[what]())
    with peak_of_processes(pid) as memory:
        answer = asked.post("/v1/embeddings", content=body)
    assert answer.status_code in (400, 413)
    assert "the limit" in answer.json()["error"]["message"]
    assert memory[-1] - memory[0] <= MOST_BYTES


def test_the_limit_can_be_raised(exported: Exported, server_environment: ServerEnvironment) -> None:
    """For the gateway and the front ends behind it."""
    files = [padded(blank(64, 64, "PNG"), 2 * SERVED_BYTES), blank(4_000, 3_000, "WEBP")]
    arguments = (*PORTS, "--http-api", "--request-memory", "400")
    with Serving(exported(NAME).parent, server_environment, *arguments) as serving:
        serving.wait_until_served()
        with httpx.Client(base_url=serving.address("http"), timeout=120, trust_env=False) as client:
            wait_until(lambda: client.get("/v2/health/ready").status_code == 200, "it is ready")
            assert embedded(client, *files).shape[0] == 2
