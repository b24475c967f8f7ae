"""Front ends of GPU variants on a real server, before towers for the CPU that are batched as on a GPU."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tritonclient.grpc
from sample_models import Exported
from stock_backends import config_of_folder

from export.triton.frontends import FrontEndSettings, frontends_from_model
from runtime import Encoder
from runtime.manifest import Manifest, Modality, Precision
from runtime.preprocessing.buckets import text_buckets
from runtime.server import ServerEnvironment, ServerOptions, running_server
from runtime.triton_config import write_config
from triton_models.spec import TextLimits


def as_on_a_gpu(model: Path, target: Path) -> tuple[Path, tuple[int, ...]]:
    """Copy a repository; its text front end pads to buckets, and Triton joins requests to the text tower."""
    copied = Path(shutil.copytree(model.parent, target)) / model.name
    manifest = Manifest.read(copied)
    tower = manifest.variant(Precision.FP32).text
    settings = FrontEndSettings(max_batch_size={Modality.TEXT: 4}, instances=4, text=TextLimits.on_gpu())
    text, _ = frontends_from_model(copied, settings=settings)
    spec = json.loads((text / "1" / "frontend.json").read_text())
    spec["tower"]["on_gpu"] = True
    (text / "1" / "frontend.json").write_text(json.dumps(spec))
    buckets = text_buckets(manifest.text.context_length, max_rows=tower.max_batch_size)
    config = config_of_folder(target / tower.model)
    config.dynamic_batching.preferred_batch_size[:] = buckets.rows
    write_config(target / tower.model, config)
    return copied, buckets.rows


def test_requests_of_several_front_ends_are_joined_into_rows_of_buckets(
    exported: Exported, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    model, rows = as_on_a_gpu(exported("capivara"), tmp_path / "r")
    texts = [f"um gato {'preto ' * (i % 3)}{i}" for i in range(400)]
    with Encoder.open(exported("capivara"), threads=1) as encoder:
        expected = encoder.embed_texts(texts)
    options = ServerOptions(verify=False)
    with running_server(model.parent, environment=server_environment, options=options) as server:
        client = tritonclient.grpc.InferenceServerClient(server.addresses.grpc)

        def one(text: str) -> np.ndarray:
            tensor = tritonclient.grpc.InferInput("text", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=object))
            vector: np.ndarray = client.infer("capivara_text", [tensor]).as_numpy("vector")
            return vector[0]

        with ThreadPoolExecutor(32) as clients:
            found = np.stack(list(clients.map(one, texts)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        tower = Manifest.read(model).variant(Precision.FP32).text.model
        statistics = client.get_inference_statistics(tower).model_stats[0]
    assert statistics.inference_stats.success.count > statistics.execution_count
    assert {batch.batch_size for batch in statistics.batch_stats} <= set(rows)
