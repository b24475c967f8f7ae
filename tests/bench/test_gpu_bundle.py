"""Bundle for a machine with a GPU: packed exactly, cut safely, small enough; lines become records."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench.gpu import bundle, samples, stamps
from bench.gpu.bundle import require_small
from bench.gpu.comparison import PeerRatios, comparisons_of, floor_ms
from bench.gpu.parts.device_code import cut_library, is_needed, units_of
from bench.gpu.parts.packing import pack_folder, unpack_folder
from bench.gpu.report import write_report
from bench.gpu.results import records_from_lines
from bench.gpu.skeletons import graph_from_skeleton, skeleton_from_graph
from bench.gpu.summary import summary_of_lines
from bench.gpu.towers import TOWERS, TimedShape, TimedTower, random_inputs, shapes_of
from bench.records.record import read_records, write_records
from runtime.errors import BabeltowerError
from runtime.manifest import Modality
from runtime.preprocessing.buckets import image_buckets, text_buckets


def unit(*codes: tuple[int, bytes]) -> bytes:
    """Device code of one compilation unit, an entry per (architecture, code)."""
    entries = b"".join(
        struct.pack("<HHIQ12xI32x", 2, 0, 64, len(code), architecture) + code for architecture, code in codes
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def elf(*kernels: str) -> bytes:
    """ELF file with a section per kernel."""
    names = b"\0" + b"".join(f".text.{name}".encode() + b"\0" for name in kernels)
    at = 64 + len(names)
    offsets, place = [], 1
    for name in kernels:
        offsets.append(place)
        place += len(f".text.{name}") + 1
    table = struct.pack("<IIQQQ32x", 0, 3, 0, 0, 64)
    table += b"".join(struct.pack("<IIQQQ32x", offset, 1, 0, 0, 0) for offset in offsets)
    head = bytearray(64)
    struct.pack_into("<Q", head, 0x28, at)
    struct.pack_into("<HH", head, 0x3C, 1 + len(kernels), 0)
    return bytes(head) + names + table


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "lib.so"
    units = [
        unit((80, b"a" * 900), (90, elf("gelu"))),
        unit((80, b"b" * 900), (90, elf("SoftmaxTopKKernel"))),
        unit((80, b"c" * 900), (90, elf())),
        unit((120, b"d" * 900)),
    ]
    path.write_bytes(b"host code" + b"more".join(units) + b"end")
    return path


@pytest.fixture
def cuobjdump(tmp_path: Path) -> Path:
    """Stand-in for NVIDIA's tool: extracts the entries of one architecture, numbered in file order."""
    tool = tmp_path / "cuobjdump"
    tool.write_text(
        "#!/usr/bin/env python3\n"
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from bench.gpu.parts.device_code import units_of\n"
        "data = Path(sys.argv[3]).read_bytes()\n"
        "entries = [e for u in units_of(data) for e in u.entries]\n"
        "for n, e in enumerate(entries, 1):\n"
        "    if sys.argv[2] == f'sm_{e.architecture}':\n"
        "        code = data[e.start + e.header_bytes : e.end]\n"
        "        Path(f'lib.{n}.sm_{e.architecture}.cubin').write_bytes(code)\n"
    )
    tool.chmod(0o755)
    return tool


def test_a_cut_library_keeps_its_size_and_the_needed_kernels(
    library: Path, cuobjdump: Path, tmp_path: Path
) -> None:
    target = tmp_path / "cut.so"
    cut = cut_library(library, target, architecture=90, cuobjdump=cuobjdump)
    before, after = library.read_bytes(), target.read_bytes()
    assert (cut.n_units, cut.n_kept) == (4, 2)
    assert len(after) == len(before)
    assert after.startswith(b"host code")
    assert after.endswith(b"end")
    kept = [[after[e.start + e.header_bytes : e.end] for e in u.entries] for u in units_of(after)]
    assert kept == [[elf("gelu")], [elf()], [elf()], [elf()]]
    assert [u.start for u in units_of(after)] == [u.start for u in units_of(before)]


def test_kernels_of_wide_heads_and_of_other_models_are_left_out() -> None:
    assert is_needed(["_Z9flash_fwdI23Flash_fwd_kernel_traitsILi64ELi128E"])
    assert not is_needed(["_Z9flash_fwdI23Flash_fwd_kernel_traitsILi256ELi64E"])
    assert is_needed(["LayerNormKernel", "SkipLayerNormKernelSmall"])
    assert not is_needed(["EmptyKernel", "MoeFCGemm"])
    assert is_needed([])


def graph(path: Path, weight: np.ndarray, *, external: bool) -> None:
    dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    tensor = numpy_helper.from_array(weight, "w")
    value = helper.make_tensor_value_info("y", dtype, weight.shape)
    nodes = [helper.make_node("Identity", ["w"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [value], [tensor]))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.stem}.data", size_threshold=0)


def test_precisions_share_their_weights_and_files_come_back_exactly(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    half = random.standard_normal((256, 256)).astype(np.float16)
    full = random.standard_normal((256, 256)).astype(np.float32)
    folder = tmp_path / "repository"
    graph(folder / "a" / "fp32.onnx", half.astype(np.float32), external=True)
    graph(folder / "a" / "fp16.onnx", half, external=False)
    graph(folder / "b" / "fp32.onnx", full, external=False)
    graph(folder / "b" / "fp16.onnx", full.astype(np.float16), external=True)
    (folder / "manifest.json").write_text("{}")
    pack_folder(folder, tmp_path / "pack")
    unpack_folder(tmp_path / "pack", tmp_path / "again")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 7
    assert all((folder / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    assert (tmp_path / "pack").stat().st_size < half.nbytes + full.nbytes + 8_000


def test_a_skeleton_is_filled_with_the_same_spread(tmp_path: Path) -> None:
    weight = 3 + 2 * np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)
    graph(tmp_path / "full.onnx", weight, external=False)
    skeleton_from_graph(tmp_path / "full.onnx", tmp_path / "skeletons" / "tower.onnx")
    assert (tmp_path / "skeletons" / "tower.onnx").stat().st_size < 1_000
    filled = graph_from_skeleton(tmp_path / "skeletons" / "tower.onnx", tmp_path / "graphs")
    (found,) = onnx.load(str(filled)).graph.initializer
    array = numpy_helper.to_array(found)
    assert array.shape == weight.shape
    assert array.mean() == pytest.approx(3, abs=0.05)
    assert array.std() == pytest.approx(2, abs=0.05)
    assert found.data_type == TensorProto.FLOAT


def test_a_bundle_that_is_too_large_names_its_largest_parts(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(10))
    (tmp_path / "large").write_bytes(bytes(3 << 20))
    assert require_small(tmp_path) == (3 << 20) + 10
    with pytest.raises(BabeltowerError, match=r"has 3\.0 MiB; at most 1 can be carried.*large 3\.0, small"):
        require_small(tmp_path, 1 << 20)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkout with one source that exports, and one sample checkpoint."""
    root = tmp_path / "checkout"
    for name in ("export/graphs/fused.py", "checkpoint/model.safetensors"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("first", encoding="utf-8")
    monkeypatch.setattr(stamps, "ROOT", root)
    monkeypatch.setattr(samples, "sample_checkpoint", lambda _: root / "checkpoint")
    return root


@pytest.mark.parametrize("changed", ["export/graphs/fused.py", "checkpoint/model.safetensors"])
def test_a_kept_sample_is_exported_again_when_what_shapes_it_changes(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    repository = tmp_path / "repository"
    done: list[str] = []

    def in_process(task: Callable[..., object], *_: object) -> None:
        done.append(task.__name__)
        left = [path.name for path in repository.glob("capivara*")]
        assert task.__name__ == "_add_cuda" or left == ["capivara-lora.manifest.json"]
        (repository / "capivara_text_fp32").mkdir(parents=True, exist_ok=True)
        (repository / "capivara.manifest.json").touch()

    repository.mkdir()
    (repository / "capivara-lora.manifest.json").touch()
    monkeypatch.setattr(samples, "in_process", in_process)
    for _ in range(2):
        samples.sample_repository(repository, ["capivara"])
    assert done == ["_export", "_add_cuda"]
    (checkout / changed).write_text("second", encoding="utf-8")
    samples.sample_repository(repository, ["capivara"])
    assert done == 2 * ["_export", "_add_cuda"]


def test_an_export_that_fails_is_not_kept(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_process(task: Callable[..., object], *_: object) -> None:
        if task.__name__ == "_add_cuda":
            raise BabeltowerError("out of memory")

    monkeypatch.setattr(samples, "in_process", in_process)
    (tmp_path / "repository").mkdir()
    for _ in range(2):
        with pytest.raises(BabeltowerError, match="out of memory"):
            samples.sample_repository(tmp_path / "repository", ["capivara"])


def test_a_kept_skeleton_is_made_again_when_what_shapes_it_changes(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = TimedTower(
        "tower", "tower", "variant", "xlm-roberta", 1, 64, 32, vocabulary=99, activation="relu"
    )
    kept = [tmp_path / "checkpoints" / "variant" / "weights", tmp_path / "variant_text" / "fp32.onnx"]
    n_exports = 0

    def in_process(*_: object) -> tuple[Path, int]:
        nonlocal n_exports
        n_exports += 1
        assert not any(path.exists() for path in kept)
        for path in kept:
            path.parent.mkdir(parents=True)
        kept[0].touch()
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
        nodes = [helper.make_node("Relu", ["x"], ["y"])]
        onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])), kept[1])
        return kept[1], 0

    monkeypatch.setattr(bundle, "in_process", in_process)
    monkeypatch.setattr(bundle, "DRY_TOWERS", ())
    found = [bundle.skeletons([tower], tmp_path) for _ in range(2)]
    assert found[0] == found[1]
    assert n_exports == 1
    (checkout / "export" / "graphs" / "fused.py").write_text("second", encoding="utf-8")
    bundle.skeletons([tower], tmp_path)
    assert n_exports == 2


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.slug)
def test_inputs_have_the_shapes_that_are_timed(tower: object) -> None:
    assert isinstance(tower, TimedTower)
    shapes = shapes_of(tower, dry=False)
    assert shapes[0].rows == 1
    if tower.modality is Modality.TEXT:  # what is timed is what the product runs
        assert {(shape.rows, shape.tokens) for shape in shapes} <= set(text_buckets(77).shapes)
        assert (256, 64) in {(shape.rows, shape.tokens) for shape in shapes if shape.ragged}
    else:
        assert {(shape.rows, 1) for shape in shapes} <= set(image_buckets().shapes)
    small = next(shape for shape in shapes if shape.rows == 8)
    inputs = random_inputs(tower, small)
    assert {len(array) for array in inputs.values()} == {8}
    assert tower.operations(small) == pytest.approx(8 * tower.operations(TimedShape(1, small.tokens)))
    if tower.modality is Modality.TEXT:
        ragged = random_inputs(tower, TimedShape(64, 16, ragged=True))["attention_mask"]
        assert 0.4 < ragged.mean() < 0.65
        assert (np.diff(ragged, axis=1) <= 0).all()


def lines() -> list[dict[str, object]]:
    speed = {
        "step": "speed",
        "tower": "XLM-R base",
        "modality": "text",
        "shape": "32×16",
        "rows": 32,
        "tokens": 16,
        "load": "",
        "by": "babeltower",
        "engine": "cuda",
        "precision": "fp16",
        "unit_vectors": True,
        "operations": 87e9,
        "product_weights": 85_000_000,
        "n_tokens": 400,
        "samples": {"device": [0.4, 0.5, 0.6], "wall": [0.7]},
        "detail": {"cuda_graph": True},
    }
    gate = {
        "step": "gate",
        "model": "capivara",
        "form": "cuda fp16",
        "languages": 1,
        "mean_recall_at_1": {"text_to_image": [0.5, 0.49]},
        "worst_drop": {"text_to_image": [0.01, "por_Latn"]},
        "recall_at_1": {"por_Latn": [0.5, 0.49]},
        "image_cosine_min": 0.9999,
        "text_cosine_min": 0.9998,
        "passes": True,
        "faults": [],
    }
    machine = {"step": "machine", "gpu": "NVIDIA H100", "driver": "580", "capability": [9, 0]}
    return [
        {**machine, "cuda": "13.0", "torch": "2.11", "onnxruntime": "1.31.1"},
        {"step": "peak", "name": "fp16", "unit": "GOP/s", "samples": [800e3, 790e3, 810e3]},
        {"step": "peak", "name": "copy", "unit": "GB/s", "samples": [3000.0]},
        {"step": "peak", "name": "fp8", "unit": "GOP/s", "error": "no such kernel"},
        gate,
        speed,
        {**speed, "by": "PyTorch", "engine": "torch", "samples": {"device": [1.5], "wall": [2.1]}},
        {**speed, "by": "PyTorch compiled", "engine": "torch", "samples": {"device": [0.4]}},
        {**speed, "by": "PyTorch", "engine": "torch", "precision": "bf16", "samples": {"device": [9.0]}},
        {**speed, "by": "babeltower, packed texts", "samples": {"device": [0.25], "wall": [1.4]}},
        {"step": "speed", "tower": "ViT-L/14", "what": "512", "error": "out of memory"},
    ]


def test_lines_become_records_of_one_environment_and_a_page(tmp_path: Path) -> None:
    records = records_from_lines(lines(), commit="abc")
    assert {record.machine["gpu"] for record in records} == {"NVIDIA H100"}
    assert {record.versions["onnxruntime"] for record in records} == {"1.31.1"}
    assert {record.commit for record in records} == {"abc"}
    write_records(records, tmp_path / "gpu.json")
    assert read_records(tmp_path / "gpu.json") == records
    device = next(record for record in records if record.cell.get("metric") == "device")
    floor = floor_ms(device, {"fp16": 800e3, "copy": 3000.0})
    assert floor == pytest.approx(1000 * max(87e9 / 800e12, 170e6 / 3e12))
    write_report(tmp_path / "gpu.json", tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert "0.500 (0.600) · 22 %" in page
    assert "49.00 %" in page
    row = "<td>32×16, fp16</td><td>800,000</td><td>3.00×</td><td>0.80×</td><td>22 %</td>"
    assert f"<tr>{row}</tr>" in page
    packed = "<td>0.500</td><td>0.250</td><td>2.00×</td><td>yes</td>"
    assert f"<td>XLM-R base 32×16, fp16, device</td>{packed}" in page
    assert "<td>0.700</td><td>1.400</td><td>0.50×</td><td>no</td>" in page
    assert "<td>32×16, fp16</td><td>571,429</td><td>3.00×</td><td>–</td><td>–</td>" in page
    assert (tmp_path / "page" / "xlm-r-base-device.png").stat().st_size > 1_000


def test_a_summary_has_a_line_per_shape_and_the_errors_last() -> None:
    text = list(summary_of_lines(json.loads(json.dumps(lines()))))
    assert text[0] == "NVIDIA H100, driver 580, torch 2.11, ORT 1.31.1"
    assert (
        "XLM-R base 32×16: fp16 0.5 (0.7); torch fp16 1.5 (2.1); torch compiled fp16 0.4; torch bf16 9; "
        "packed texts fp16 0.25 (1.4)" in text
    )
    ratios = "3.00× torch, 0.80× torch compiled, 22 % of the limit"
    assert f"XLM-R base 32×16 fp16, device: 800,000 tokens/s, {ratios}" in text
    assert "XLM-R base 32×16 fp16, wall: 571,429 tokens/s, 3.00× torch" in text
    faster = "packed texts are 2.00× as fast as padded ones"
    assert f"XLM-R base 32×16 fp16, device: {faster}" in text
    assert text[-1] == "! speed ViT-L/14 512: out of memory"


def test_the_product_is_compared_with_cells_of_its_own_shape_metric_and_precision() -> None:
    device, wall = comparisons_of(records_from_lines(lines(), commit=None))
    assert device == PeerRatios(
        "XLM-R base",
        "32×16",
        "device",
        "fp16",
        0.5,
        pytest.approx(400 / 0.5e-3),
        pytest.approx(3.0),
        pytest.approx(0.8),
        pytest.approx(1000 * (87e9 / 800e12) / 0.5),
    )
    assert (wall.metric, wall.eager, wall.compiled, wall.limit) == ("wall", pytest.approx(3.0), None, None)
    alone = [line for line in lines() if line.get("by") in (None, "babeltower") and line["step"] != "peak"]
    for found in comparisons_of(records_from_lines(alone, commit=None)):
        assert (found.eager, found.compiled, found.limit) == (None, None, None)


def test_a_run_without_a_machine_line_is_refused() -> None:
    with pytest.raises(BabeltowerError, match="wrote no line about its machine"):
        records_from_lines([], commit=None)
