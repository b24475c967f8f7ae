"""ONNX Runtime on CUDA, on stand-ins for the library and the GPU; see ``tests/doubles/cuda_double.py``."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from cuda_double import CudaBindings, CudaOnnxRuntime, install
from precision_models import batches_of, graph_of
from sample_models import CHECKPOINTS, Exported
from typer.testing import CliRunner

from export.precision.cuda import cuda_from_onnx
from export.repository import ExportOptions, repository_from_checkpoint
from export.variants import FORMS, forms_for
from runtime.backends import open_backend, require_computes
from runtime.backends.backend import Backend
from runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from runtime.commands.app import app
from runtime.device import CPU, Device, device_from_name
from runtime.encoder import Encoder
from runtime.errors import EngineError, OpeningCheckError
from runtime.manifest import Engine, Manifest, Modality, Precision
from runtime.preprocessing.buckets import image_buckets, text_buckets

Doubles = tuple[CudaBindings, CudaOnnxRuntime]


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doubles:
    return install(monkeypatch, tmp_path / "doubles")


def fused(model: Path, modality: Modality, folder: Path) -> Path:
    target = folder / modality.value / "model.onnx"
    cuda_from_onnx(graph_of(model, modality), target, data_name="w", precision=Precision.FP32)
    return target


def inputs(rows: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows * length)
    ids = rng.integers(5, 5_000, (rows, length))
    mask = np.ones_like(ids)
    for row in range(rows):
        n_tokens = int(rng.integers(1, length + 1))
        ids[row, n_tokens:], mask[row, n_tokens:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_any_batch_gives_the_vectors_of_the_exported_graph(
    doubles: Doubles, exported: Exported, tmp_path: Path
) -> None:
    model = exported("nllb-clip")
    expected = open_backend(Engine.ONNXRUNTIME, graph_of(model, Modality.TEXT), precision=Precision.FP32)
    found = open_backend(Engine.CUDA, fused(model, Modality.TEXT, tmp_path), precision=Precision.FP32)
    for rows, length in ((1, 1), (1, 77), (3, 20), (65, 9), (512, 13), (600, 9), (300, 60)):
        given = inputs(rows, length)
        (one,), (other,) = expected.run(given, ["vector"]), found.run(given, ["vector"])
        assert one.shape == other.shape
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-6)
    found.close()
    found.close()
    assert not doubles[0].memory, "memory was not released"
    with pytest.raises(EngineError, match="is closed"):
        found.run(inputs(1, 1), ["vector"])


def test_packed_texts_run_in_their_own_shapes_and_are_never_captured(
    doubles: Doubles, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = graph_of(exported("nllb-clip"), Modality.TEXT), tmp_path / "model.onnx"
    cuda_from_onnx(source, target, data_name="w", precision=Precision.FP32, packed_text=True)
    expected = open_backend(Engine.ONNXRUNTIME, source, precision=Precision.FP32)
    found = OnnxRuntimeCudaBackend(target, precision=Precision.FP32)
    assert doubles[1].graph_sessions == [True, False], "the session that stays captures no CUDA graph"
    shapes = []
    running = found._opened()
    launch = running._launch
    monkeypatch.setattr(running, "_launch", lambda shape: (shapes.append(shape), launch(shape)))
    for rows, length in ((1, 1), (3, 20), (65, 9), (300, 40), (513, 30), (450, 40), (3, 20)):
        given = inputs(rows, length)
        (one,), (other,) = expected.run(given, ["vector"]), found.run(given, ["vector"])
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-6)
    assert list(dict.fromkeys(shapes)) == [
        *((1, 1), (3, 20), (65, 9), (300, 40), (512, 30), (1, 30)),
        *((409, 40), (41, 40)),
    ]
    assert found.n_captured == 0
    assert not doubles[1].captures
    found.close()
    assert not doubles[0].memory, "memory was not released"


def test_a_full_run_of_one_length_is_run_whole(
    doubles: Doubles, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OnnxRuntimeCudaBackend(
        fused(exported("nllb-clip"), Modality.TEXT, tmp_path), precision=Precision.FP32
    )
    running = backend._opened()
    launched = []
    monkeypatch.setattr(running, "_launch", launched.append)
    for rows, length in ((409, 40), (512, 20), (212, 77)):
        backend.run(inputs(rows, length), ["vector"])
    assert list(dict.fromkeys(launched)) == [(409, 40), (512, 20), (128, 77)]
    backend.close()


def test_threads_share_a_backend_without_mixing_rows(
    doubles: Doubles, exported: Exported, tmp_path: Path
) -> None:
    model = exported("nllb-clip")
    cpu = open_backend(Engine.ONNXRUNTIME, graph_of(model, Modality.TEXT), precision=Precision.FP32)
    backend = open_backend(Engine.CUDA, fused(model, Modality.TEXT, tmp_path), precision=Precision.FP32)
    given = [inputs(rows, length) for rows, length in ((1, 5), (2, 16), (9, 16), (33, 30), (4, 77))]
    expected = [cpu.run(one, ["vector"])[0] for one in given]
    wrong: list[float] = []

    def work(number: int) -> None:
        for turn in range(8):
            index = (number + turn) % len(given)
            found = backend.run(given[index], ["vector"])[0]
            wrong.append(float(np.abs(found - expected[index]).max()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 48
    assert max(wrong) <= 2e-6


def test_realistic_requests_capture_few_graphs(
    doubles: Doubles, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 requests of 1 to 32 texts, by two threads: one capture per bucket, in at most 1% of the runs."""
    gpu, module = doubles
    model = exported("nllb-clip")
    backend = open_backend(Engine.CUDA, fused(model, Modality.TEXT, tmp_path), precision=Precision.FP32)
    monkeypatch.setattr("cuda_double._Session.computes", False)
    rng = np.random.default_rng(0)
    buckets = text_buckets(77)
    batches: list[np.ndarray] = []
    for _ in range(10_000):
        lengths = np.clip(rng.gamma(5, 3.1, int(rng.integers(1, 33))).astype(int) + 2, 3, 77)
        for run in buckets.runs(lengths):
            batches.append(np.ones((len(run.positions), run.length), np.int64))

    def work(ids: np.ndarray) -> None:
        backend.run({"input_ids": ids, "attention_mask": ids}, ["vector"])

    with ThreadPoolExecutor(2) as callers:
        assert len(list(callers.map(work, batches))) == len(batches)
    assert module.runs == len(batches)
    assert not gpu.spoilt
    assert len(set(module.captures)) == len(module.captures)
    assert len(module.captures) <= len(buckets.shapes)
    assert len(module.captures) <= 0.01 * module.runs
    assert isinstance(backend, OnnxRuntimeCudaBackend)
    assert backend.n_captured == len(module.captures)


def test_memory_grows_while_another_thread_captures(
    doubles: Doubles, exported: Exported, tmp_path: Path
) -> None:
    """The first batch is being captured until the second one has allocated its memory."""
    gpu, module = doubles
    model = exported("nllb-clip")
    backend = open_backend(Engine.CUDA, fused(model, Modality.TEXT, tmp_path), precision=Precision.FP32)
    begun = threading.Event()

    def during_capture() -> None:
        begun.set()
        assert gpu.allocated.wait(60), "the second batch waits for the first one's computation"

    gpu.during_capture = during_capture
    with ThreadPoolExecutor(1) as caller:
        first = caller.submit(backend.run, inputs(2, 8), ["vector"])
        assert begun.wait(60)
        (other,) = backend.run(inputs(9, 30), ["vector"])
        (one,) = first.result()
    assert gpu.spoilt == []
    assert [number for _, number in module.captures] == ["1", "2"]
    np.testing.assert_array_equal(backend.run(inputs(2, 8), ["vector"])[0], one)
    np.testing.assert_array_equal(backend.run(inputs(9, 30), ["vector"])[0], other)


def test_a_tower_is_opened_and_closed_while_another_one_captures(
    doubles: Doubles, exported: Exported, tmp_path: Path
) -> None:
    gpu, module = doubles
    model = exported("nllb-clip")
    graphs = [fused(model, modality, tmp_path) for modality in (Modality.TEXT, Modality.IMAGE)]
    (pictures,) = batches_of(model, Modality.IMAGE)
    backend = open_backend(Engine.CUDA, graphs[0], precision=Precision.FP32)
    shapes = text_buckets(77).shapes[:20]
    with ThreadPoolExecutor(1) as caller:
        texts = [caller.submit(backend.run, inputs(*shape), ["vector"]) for shape in shapes]
        while not texts[-1].done():
            other = open_backend(Engine.CUDA, graphs[1], precision=Precision.FP32)
            other.run({"pixels": pictures["pixels"][:1]}, ["vector"])
            other.close()
        assert all(len(text.result()[0]) for text in texts)
    assert gpu.spoilt == []
    assert len(set(module.captures)) == len(module.captures)
    assert len(module.threads) == 1
    backend.close()
    assert not gpu.memory


def test_the_processor_never_steps_in(doubles: Doubles, exported: Exported, tmp_path: Path) -> None:
    graph = fused(exported("nllb-clip"), Modality.IMAGE, tmp_path)
    _, module = doubles
    module.refuses = "This session contains graph nodes that are assigned to the default CPU EP"
    with pytest.raises(EngineError, match=r"cannot open .* on GPU 0 \(NVIDIA L4\): This session contains"):
        open_backend(Engine.CUDA, graph, precision=Precision.FP32)
    module.refuses, module.provider = "", "CPUExecutionProvider"
    with pytest.raises(EngineError, match="'CPUExecutionProvider' would run"):
        open_backend(Engine.CUDA, graph, precision=Precision.FP32)
    assert not doubles[0].memory


def test_the_session_is_bound_to_one_gpu_and_its_stream(
    doubles: Doubles, exported: Exported, tmp_path: Path
) -> None:
    graph = fused(exported("nllb-clip"), Modality.IMAGE, tmp_path)
    doubles[0]._n_devices = 2
    backend = open_backend(Engine.CUDA, graph, precision=Precision.FP32, device=Device(1))
    assert isinstance(backend, OnnxRuntimeCudaBackend)
    ((provider, options),) = doubles[1].providers
    assert provider == "CUDAExecutionProvider"
    assert options["device_id"] == "1"
    assert options["use_tf32"] == "0"
    assert options["enable_cuda_graph"] == "1"
    assert int(options["user_compute_stream"]) == backend._opened()._device.stream
    assert doubles[1].config["session.disable_cpu_ep_fallback"] == "1"
    with pytest.raises(EngineError, match="GPU 2 is not available"):
        open_backend(Engine.CUDA, graph, precision=Precision.FP32, device=Device(2))


def test_an_error_while_running_leaves_the_backend_usable(
    doubles: Doubles, exported: Exported, tmp_path: Path
) -> None:
    gpu, _ = doubles
    backend = open_backend(
        Engine.CUDA, fused(exported("nllb-clip"), Modality.TEXT, tmp_path), precision=Precision.FP32
    )
    (expected,) = backend.run(inputs(2, 6), ["vector"])
    for function in ("cudaMemcpyAsync", "cudaStreamWaitEvent", "cudaStreamSynchronize", "cudaEventRecord"):
        gpu.failing = function
        with pytest.raises(EngineError, match=f"{function} failed on GPU 0: out of memory"):
            backend.run(inputs(2, 6), ["vector"])
        gpu.failing = ""
        np.testing.assert_array_equal(backend.run(inputs(2, 6), ["vector"])[0], expected)


@pytest.mark.parametrize(
    ("given", "outputs", "match"),
    [
        ({}, ["vector"], "Input 'input_ids' of .* is nothing; expected int64"),
        (inputs(1, 78), ["vector"], "A row of 78 tokens is longer than the tower's 77"),
        (inputs(1, 7), ["vecteur"], "has no output 'vecteur'; it has"),
        ({name: a.astype(np.int32) for name, a in inputs(1, 7).items()}, ["vector"], "is int32"),
        ({name: a[:0] for name, a in inputs(1, 7).items()}, ["vector"], "expected equal numbers of rows"),
    ],
)
def test_bad_inputs_are_named(
    given: dict[str, np.ndarray],
    outputs: list[str],
    match: str,
    doubles: Doubles,
    exported: Exported,
    tmp_path: Path,
) -> None:
    backend = open_backend(
        Engine.CUDA, fused(exported("nllb-clip"), Modality.TEXT, tmp_path), precision=Precision.FP32
    )
    with pytest.raises(EngineError, match=match):
        backend.run(given, outputs)


def test_a_text_graph_states_its_context_length(doubles: Doubles, exported: Exported, tmp_path: Path) -> None:
    graph = fused(exported("nllb-clip"), Modality.TEXT, tmp_path)
    model = onnx.load(str(graph))
    kept = [entry for entry in model.metadata_props if entry.key != "babeltower.context_length"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, str(graph))
    with pytest.raises(EngineError, match="does not state its context length"):
        open_backend(Engine.CUDA, graph, precision=Precision.FP32)


def test_closing_waits_for_the_runs_under_way(doubles: Doubles, exported: Exported, tmp_path: Path) -> None:
    for _ in range(5):
        graph = fused(exported("nllb-clip"), Modality.TEXT, tmp_path)
        backend = open_backend(Engine.CUDA, graph, precision=Precision.FP32)
        refused: list[str] = []

        def work(backend: Backend = backend, refused: list[str] = refused) -> None:
            try:
                for _ in range(50):
                    backend.run(inputs(3, 12), ["vector"])
            except EngineError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        backend.close()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
        assert len(refused) == 6
        assert all("closed" in message for message in refused)
        assert not doubles[0].memory


def test_memory_that_runs_out_while_opening_is_given_back(
    doubles: Doubles, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = fused(exported("nllb-clip"), Modality.TEXT, tmp_path)
    doubles[0].failing = "cudaEventCreate"
    with pytest.raises(EngineError, match="cudaEventCreate failed on GPU 0: out of memory"):
        open_backend(Engine.CUDA, graph, precision=Precision.FP32)
    assert not doubles[0].memory


def test_bf16_needs_a_gpu_that_has_it(doubles: Doubles, monkeypatch: pytest.MonkeyPatch) -> None:
    require_computes(Engine.CUDA, Precision.BF16)
    monkeypatch.setattr(doubles[0], "_cudaDeviceGetAttribute", None, raising=False)
    monkeypatch.setattr(type(doubles[0]), "_cudaDeviceGetAttribute", lambda self, which, index: (7, 5)[which])
    require_computes(Engine.CUDA, Precision.FP16)
    with pytest.raises(
        EngineError, match=r"capability 7\.5\) has no products in bf16. Pass precision='fp16'"
    ):
        require_computes(Engine.CUDA, Precision.BF16)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_precisions_that_cuda_does_not_compute_are_refused(precision: Precision, doubles: Doubles) -> None:
    with pytest.raises(EngineError, match=f"does not support {precision.value} on CUDA"):
        require_computes(Engine.CUDA, precision)


@pytest.mark.parametrize(
    ("name", "device"), [("cpu", CPU), ("cuda", Device(0)), ("cuda:0", Device(0)), ("cuda:7", Device(7))]
)
def test_device_names(name: str, device: Device) -> None:
    assert device_from_name(name) == device
    assert device_from_name(str(device)) == device


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:-1", "cuda:00", "cuda:\u0661", "cuda:x", "CUDA", "cuda:1234", None, 0]
)
def test_other_names_are_no_device(name: str) -> None:
    with pytest.raises(EngineError, match="expected 'cpu', 'cuda' or 'cuda:N'"):
        device_from_name(name)


@pytest.mark.parametrize(
    ("engine", "device", "match"),
    [
        ("onnxruntime", "cuda", r"onnxruntime does not run on cuda:0; \['cuda', 'tensorrt'\] do"),
        ("openvino", "cuda:1", "openvino does not run on cuda:1"),
        ("cuda", "cpu", r"cuda does not run on cpu; \['onnxruntime', 'openvino'\] do"),
        (None, "mps", "Device 'mps' is unknown"),
    ],
)
def test_an_engine_runs_on_its_own_kind_of_device(
    engine: str | None, device: str, match: str, exported: Exported
) -> None:
    with pytest.raises(EngineError, match=match):
        Encoder.open(exported("nllb-clip"), engine=engine, device=device)


@pytest.fixture
def published(doubles: Doubles, tmp_path: Path) -> Path:
    """A model exported for CUDA in three precisions, through the gate."""
    forms = tuple(form for form in FORMS if form.engine is Engine.CUDA)
    repository_from_checkpoint(
        CHECKPOINTS / "nllb-clip",
        tmp_path / "repository",
        options=ExportOptions(forms=forms, captions_per_language=2),
    )
    return tmp_path / "repository" / "nllb-clip"


def test_an_export_for_cuda_is_judged_recorded_and_opened(
    published: Path, exported: Exported, doubles: Doubles
) -> None:
    manifest = Manifest.read(published)
    assert sorted(manifest.variants) == ["bf16_cuda", "fp16_cuda", "fp32_cuda"]
    for variant in manifest.variants.values():
        assert variant.engines == ("cuda",)
        assert variant.measured_on["gpu"] == "NVIDIA L4"
        assert variant.measured_on["driver"] == "13.0"
        assert variant.measured_on["provider"] == "CUDAExecutionProvider"
        assert variant.parity["retrieval"]
        assert variant.recipe["text"]["fused"]["attentions"] > 0
    texts = ["um gato preto", "uma casa", "o mar azul ao longe"]
    with Encoder.open(exported("nllb-clip")) as encoder:
        expected = encoder.embed_texts(texts, "pt")
    with Encoder.open(published, device="cuda") as encoder:  # FP32, on ONNX Runtime's CUDA
        np.testing.assert_allclose(encoder.embed_texts(texts, "pt"), expected, rtol=0, atol=2e-6)
        assert encoder.stats.padding_tokens > 0
    with Encoder.open(published, device="cuda:0", precision="bf16") as encoder:
        found = encoder.embed_texts(texts, "pt")
        assert (found * expected).sum(axis=1).min() > 0.99
    _damage(published)
    with (
        Encoder.open(published, device="cuda") as encoder,
        pytest.raises(OpeningCheckError, match=r"on NVIDIA L4 \(compute capability 8.9, CUDA 13.0"),
    ):
        encoder.embed_texts(texts, "pt")


def _damage(model: Path) -> None:
    """Change the FP32 text tower's weights, and its record in the manifest: what a checksum cannot see."""
    from runtime.manifest import manifest_path, record_of_file

    manifest = Manifest.read(model)
    tower = manifest.variants["fp32_cuda"].text
    graph = model.parent / tower.model / "1" / "model.onnx"
    loaded = onnx.load(str(graph))
    for tensor in loaded.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(-array[::-1].copy(), tensor.name))
    before = record_of_file(model.parent, graph)
    onnx.save(loaded, str(graph))
    after = record_of_file(model.parent, graph)
    path = manifest_path(model)
    text = path.read_text(encoding="utf-8").replace(before.sha256, after.sha256)
    path.write_text(
        text.replace(f'"size_bytes": {before.size_bytes}', f'"size_bytes": {after.size_bytes}'), "utf-8"
    )


def test_image_batches_are_cut_to_the_largest_shape(
    doubles: Doubles, exported: Exported, tmp_path: Path
) -> None:
    model = exported("nllb-clip")
    backend = open_backend(Engine.CUDA, fused(model, Modality.IMAGE, tmp_path), precision=Precision.FP32)
    cpu = open_backend(Engine.ONNXRUNTIME, graph_of(model, Modality.IMAGE), precision=Precision.FP32)
    (batch,) = batches_of(model, Modality.IMAGE)
    given = {"pixels": np.concatenate([batch["pixels"]] * 40)[:530]}
    np.testing.assert_allclose(
        backend.run(given, ["vector"])[0], cpu.run(given, ["vector"])[0], rtol=0, atol=1e-6
    )
    assert doubles[1].runs == 2
    assert len(doubles[1].captures) == 2 <= len(image_buckets().shapes)


@pytest.mark.parametrize(
    ("provider", "remedy"),
    [("TensorrtExecutionProvider", "engine='tensorrt'"), ("CUDAExecutionProvider", "device='cuda'")],
)
def test_no_provider_of_a_gpu_runs_a_graph_for_cpus(
    provider: str, remedy: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    with pytest.raises(EngineError, match=f"{provider} cannot run a graph made for CPUs.*{remedy}"):
        Encoder.open(exported("nllb-clip"), provider=provider)
    with pytest.raises(EngineError, match="provider is ''; expected a name"):
        Encoder.open(exported("nllb-clip"), provider="")
    with pytest.raises(EngineError, match=r"cuda takes no provider; got .* Pass device='cuda:N'"):
        open_backend(
            Engine.CUDA,
            graph_of(exported("nllb-clip"), Modality.TEXT),
            precision=Precision.FP32,
            provider=provider,
        )


def embed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["embed", *arguments])
    assert done.exit_code == 1, done.output
    return " ".join(done.output.split())


def test_a_gpu_that_is_missing_leaves_no_trace_in_the_folder(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused run must not decide for the next one."""
    source, out = tmp_path / "texts.txt", tmp_path / "out"
    source.write_text("um gato\n", encoding="utf-8")
    model = exported("nllb-clip")
    arguments = (str(model), str(source), "--out", str(out), "--language", "pt")
    said = embed(*arguments, "--device", "cuda:0", "--precision", "fp16")
    assert "has no variant in fp16 on cuda:0 that an installed engine runs" in said
    assert "export the checkpoint with --engine cuda --precision fp16" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.corpus.run.computation_of", _fails)
        assert "GPU 0 is not available" in embed(*arguments, "--threads", "1", "--instances", "1")
    assert not out.exists() or not list(out.iterdir())
    chosen = ("--engine", "onnxruntime", "--threads", "1", "--instances", "1")
    done = CliRunner().invoke(app, ["embed", *arguments, *chosen])
    assert done.exit_code == 0, done.output
    said = embed(*arguments, "--device", "cuda")
    assert "holds vectors of onnxruntime, which does not run on cuda:0" in said


def _fails(*arguments: object) -> None:
    raise EngineError("GPU 0 is not available: CUDA reports 'no device' and 0 GPUs.")


@pytest.mark.parametrize("option", ["--max-batch-tokens", "--rows-per-part"])
def test_numbers_without_measure_are_refused(option: str, exported: Exported, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("um gato\n", encoding="utf-8")
    said = embed(str(exported("nllb-clip")), str(source), "--out", str(tmp_path / "out"), option, "9" * 20)
    assert "expected at most 100,000,000" in said
    assert not (tmp_path / "out").exists()


def test_a_corpus_is_embedded_in_large_unpadded_runs(
    published: Path, exported: Exported, doubles: Doubles, tmp_path: Path
) -> None:
    """A few words of each of 40 lengths, 3,000 texts: hundreds of rows a run, and few tokens of padding."""
    words = ["gato", "casa", "mar", "sol", "azul"]
    rng = np.random.default_rng(0)
    lengths = rng.gamma(4, 1.2, 3_000).astype(int) + 1
    texts = [f"{' '.join(rng.choice(words, n))} {i}" for i, n in enumerate(lengths)]
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(texts) + "\n", encoding="utf-8")
    before, n_captures = doubles[1].runs, len(doubles[1].captures)
    result = CliRunner().invoke(
        app,
        [
            *("embed", str(published), str(source), "--out", str(tmp_path / "out")),
            *("--language", "pt", "--device", "cuda:0", "--precision", "fp32", "--json"),
        ],
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["arguments"]["engine"] == "cuda"
    assert record["arguments"]["max_batch_tokens"] == 16_384
    assert "NVIDIA L4" in record["computations"][0]["cpu"]
    assert record["padding_share"] <= 0.2
    captures = doubles[1].captures[n_captures:]
    assert not doubles[0].spoilt
    assert len(captures) == len(set(captures)) <= len(text_buckets(77).shapes)
    n_runs = doubles[1].runs - before
    assert 3_000 / n_runs >= 150
    (part,) = (tmp_path / "out").glob("*.parquet")
    found = np.stack(pq.read_table(part)["vector"].to_numpy(zero_copy_only=False))
    with Encoder.open(exported("nllb-clip")) as encoder:
        expected = encoder.embed_texts(texts[::50], "pt")
    np.testing.assert_allclose(found[::50], expected, rtol=0, atol=2e-6)


def test_a_corpus_is_embedded_by_a_packed_tower(exported: Exported, doubles: Doubles, tmp_path: Path) -> None:
    """The manifest says that the tower packs, so that texts of all lengths share runs."""
    forms = forms_for([Precision.FP16], [Engine.CUDA], installed=[Engine.CUDA], packed_text=True)
    done = repository_from_checkpoint(
        CHECKPOINTS / "nllb-clip",
        tmp_path / "repository",
        options=ExportOptions(forms=forms, captions_per_language=2),
    )
    (variant,) = done.manifest.variants.values()
    assert variant.packs_text
    assert variant.recipe["text"]["packed_text"] is True
    assert "packed_text" not in variant.recipe["image"]
    assert not Manifest.read(exported("nllb-clip")).variants["fp32"].packs_text
    texts = [f"{'gato azul ' * (i % 23)}{i}" for i in range(900)]
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(texts) + "\n", encoding="utf-8")
    before = doubles[1].runs
    result = CliRunner().invoke(
        app,
        [
            *("embed", str(done.model), str(source), "--out", str(tmp_path / "out")),
            *("--language", "pt", "--device", "cuda:0", "--precision", "fp16", "--json"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert doubles[1].runs - before <= 12, "texts of one length did not share runs"
    text_sessions = doubles[1].graph_sessions
    assert False in text_sessions
    (part,) = (tmp_path / "out").glob("*.parquet")
    found = np.stack(pq.read_table(part)["vector"].to_numpy(zero_copy_only=False))
    with Encoder.open(exported("nllb-clip")) as encoder:
        expected = encoder.embed_texts(texts, "pt")
    assert (found * expected).sum(axis=1).min() > 0.9999
    with Encoder.open(done.model, device="cuda", precision="fp16") as encoder:
        again = encoder.embed_texts(texts, "pt")
    np.testing.assert_allclose(again, found, rtol=0, atol=2e-3)
    assert encoder.stats.padding_tokens > 0
