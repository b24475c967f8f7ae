"""The files of ``--layout web``: parts, galleries, libraries, the command and its errors."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_models import CHECKPOINTS
from small_exports import FEW
from typer.testing import CliRunner
from vector_folders import unit_vectors, write_shard
from web_pages import npm_packages, towers_of

from export.layouts.names import LayoutName
from export.layouts.publish import RECORD_FILE, layout_from_towers
from export.layouts.registry import LAYOUTS
from export.layouts.web.assets import PART_BYTES, write_asset, write_joined
from export.layouts.web.gallery import GallerySource, WebGallery, gallery_of_folder, write_pictures
from export.layouts.web.layout import WebOptions, web_layout
from export.layouts.web.packages import PACKAGES, copy_packages
from export.variants import forms_for
from export.vocabulary.selection import VocabularyOptions
from runtime.commands.app import app
from runtime.embeddings import Encoding, encoded_from_float
from runtime.errors import ExportError, InputError
from runtime.manifest import Engine, Precision

SPACE, DIM = "space", 32


@pytest.mark.parametrize("n_bytes", [0, 1, 999, 1_000, 1_001, 3_000, 3_500])
@pytest.mark.parametrize("is_text", [True, False])
def test_an_asset_is_split_and_joined(n_bytes: int, is_text: bool, tmp_path: Path) -> None:
    data = b"a" * n_bytes if is_text else np.random.default_rng(0).bytes(n_bytes)
    asset = write_asset(tmp_path, "model/file", data, part_bytes=1_000)
    files = [tmp_path / part.path for part in asset.parts]
    assert all(
        file.stat().st_size == part.bytes <= 1_000 for file, part in zip(files, asset.parts, strict=True)
    )
    assert asset.compressed is (is_text and n_bytes > 1)
    write_joined(tmp_path, asset.as_json(), tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == data


def test_a_file_is_split_without_being_compressed(tmp_path: Path) -> None:
    asset = write_asset(tmp_path, "weights", io.BytesIO(b"a" * 2_500), part_bytes=1_000)
    assert [part.path for part in asset.parts] == ["weights.000", "weights.001", "weights.002"]
    assert not asset.compressed
    (tmp_path / "weights.001").write_bytes(b"b" * 1_000)
    with pytest.raises(ExportError, match=r"weights\.001 was changed"):
        write_joined(tmp_path, asset.as_json(), tmp_path / "joined")


# --- galleries


def folder_of_vectors(work: Path, ids: list[str], *, source: str = "", **options: object) -> Path:
    folder = work / "vectors"
    folder.mkdir()
    options = {"fingerprint": SPACE, "modality": "image", **options}
    write_shard(folder / "part-00000.parquet", ids, unit_vectors(len(ids), DIM), source=source, **options)  # type: ignore[arg-type]
    return folder / "part-00000.parquet"


def gallery_of(source: GallerySource) -> WebGallery:
    return gallery_of_folder(source, fingerprint=SPACE, dims=[DIM, 16])


def images_in(folder: Path, names: list[str]) -> None:
    folder.mkdir()
    noise = np.random.default_rng(1)
    for name in names:
        Image.fromarray(noise.integers(0, 256, (400, 500, 3), np.uint8)).save(folder / name)


def test_a_gallery_has_the_rows_and_pictures_of_its_folder(tmp_path: Path) -> None:
    names = ["a b.png", "ü.jpg", "c.webp"]
    images_in(tmp_path / "photos", names)
    vectors = folder_of_vectors(tmp_path, names, source=str(tmp_path / "photos"))
    gallery = gallery_of(GallerySource(vectors))
    assert gallery.names == names
    assert np.allclose(gallery.vectors, unit_vectors(3, DIM), atol=1e-6)
    assert "the recorded source" in gallery.notes[0]
    paths, notes = write_pictures(gallery, tmp_path / "page")
    assert paths == [f"gallery/pictures/{i:06d}.jpeg" for i in range(3)]
    assert notes == ()
    for path in paths:
        with Image.open(tmp_path / "page" / str(path)) as image:
            assert max(image.size) == 320


def test_missing_and_damaged_pictures_are_told(tmp_path: Path) -> None:
    images_in(tmp_path / "photos", ["a.png", "b.png"])
    (tmp_path / "photos" / "b.png").write_bytes(b"no image")
    vectors = folder_of_vectors(tmp_path, ["a.png", "b.png", "c.png"])
    gallery = gallery_of(GallerySource(vectors, pictures=tmp_path / "photos"))
    paths, (note,) = write_pictures(gallery, tmp_path / "page")
    assert [path is None for path in paths] == [False, True, True]
    assert note.startswith("2 of 3 items have no picture ('b.png': ")


def test_a_place_without_any_of_the_pictures_is_refused(tmp_path: Path) -> None:
    images_in(tmp_path / "photos", ["other.png"])
    gallery = gallery_of(GallerySource(folder_of_vectors(tmp_path, ["a.png"]), pictures=tmp_path / "photos"))
    with pytest.raises((ExportError, InputError), match="none of the 1 pictures"):
        write_pictures(gallery, tmp_path / "page")


def test_a_gallery_without_pictures_is_told(tmp_path: Path) -> None:
    (note,) = gallery_of(GallerySource(folder_of_vectors(tmp_path, ["a"], source="gone/photos"))).notes
    assert "gone/photos" in note
    assert "--pictures" in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fingerprint": "other"}, "holds vectors of space 'other'"),
        ({"dim": 24}, "holds 24-wide vectors; the text tower gives 32, 16"),
        ({"encoding": Encoding.BINARY, "dim": 32}, "one bit a component"),
    ],
)
def test_vectors_that_a_page_cannot_compare_are_refused(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    n = int(options.get("dim", DIM))  # type: ignore[call-overload]
    encoding = options.get("encoding", Encoding.FLOAT32)
    rows = encoded_from_float(unit_vectors(3, n), encoding)  # type: ignore[arg-type]
    path = tmp_path / "part-00000.parquet"
    write_shard(path, ["a", "b", "c"], rows, **{"fingerprint": SPACE, **options})  # type: ignore[arg-type]
    with pytest.raises((ExportError, InputError), match=message):
        gallery_of(GallerySource(path))


@pytest.mark.parametrize("encoding", [Encoding.FLOAT16, Encoding.INT8])
def test_stored_vectors_are_decoded(encoding: Encoding, tmp_path: Path) -> None:
    rows = encoded_from_float(unit_vectors(5, DIM), encoding)
    path = write_shard(
        tmp_path / "part-00000.parquet", [1, 2, 3, 4, 5], rows, fingerprint=SPACE, encoding=encoding
    )
    gallery = gallery_of(GallerySource(path))
    assert gallery.names == ["1", "2", "3", "4", "5"]
    assert gallery.kind == "texts"
    assert np.allclose(gallery.vectors, unit_vectors(5, DIM), atol=1e-2)
    assert np.allclose(np.linalg.norm(gallery.vectors, axis=1), 1, atol=1e-6)


def test_a_folder_without_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds no vectors"):
        gallery_of(GallerySource(tmp_path))


def test_a_gallery_is_checked_before_any_work(tmp_path: Path) -> None:
    layout = web_layout(WebOptions(GallerySource(tmp_path), npm_packages()))
    with pytest.raises(ExportError, match="holds no vectors"):
        layout.place(towers_of("capivara"), "page")


# --- libraries


def test_libraries_are_read_from_tarballs_and_from_node_modules(tmp_path: Path) -> None:
    modules = tmp_path / "project" / "node_modules"
    for package in PACKAGES:
        with tarfile.open(npm_packages() / package.tarball) as archive:
            archive.extractall(modules / package.name, filter="data")
        for file in (modules / package.name / "package").iterdir():
            file.rename(modules / package.name / file.name)
    for i, given in enumerate((npm_packages(), modules, modules.parent)):
        copy_packages(tmp_path / str(i), given)
    found = [
        {file.relative_to(tmp_path / str(i)): file.read_bytes() for file in (tmp_path / str(i)).rglob("*.*")}
        for i in range(3)
    ]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4
    (modules / "onnxruntime-web" / "dist" / "ort.wasm.min.mjs").write_text("changed")
    with pytest.raises(ExportError, match=r"is not onnxruntime-web@.* has another checksum"):
        copy_packages(tmp_path / "changed", modules)


def test_a_folder_without_the_libraries_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="`npm pack onnxruntime-web@"):
        copy_packages(tmp_path / "vendor", tmp_path)


def test_without_npm_the_libraries_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ExportError, match="--npm-packages FOLDER"):
        copy_packages(tmp_path / "vendor", None)


def test_fetched_libraries_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the cache are used, and a damaged one is fetched again, here without npm."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "babeltower" / "npm"
    kept.mkdir(parents=True)
    for package in PACKAGES:
        shutil.copyfile(npm_packages() / package.tarball, kept / package.tarball)
    monkeypatch.setenv("PATH", "")
    copy_packages(tmp_path / "vendor", None)
    (kept / PACKAGES[0].tarball).write_bytes(b"damaged")
    with pytest.raises(ExportError, match="npm, which would fetch it, is not here"):
        copy_packages(tmp_path / "again", None)


# --- the command


def test_the_command_writes_a_page_in_int8(tmp_path: Path) -> None:
    command = [
        "export",
        str(CHECKPOINTS / "capivara"),
        str(tmp_path / "a site"),
        "--layout",
        "web",
        "--name",
        "photos",
    ]
    few = ["--languages", "por,eng", "--captions-per-language", "24", "--texts-per-language", "1"]
    few += ["--threads", "1", "--accept-drop", "20"]  # of so few captions
    result = CliRunner().invoke(app, [*command, *few, "--npm-packages", str(npm_packages()), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    folder = tmp_path / "a site" / "photos"
    assert said["precision"] == "int8"
    assert said["layout"] == "web"
    assert said["model"] == str(folder)
    listed = {file["path"] for file in said["files"]}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present - listed == {RECORD_FILE}
    assert listed <= present
    assert max(path.stat().st_size for path in folder.rglob("*")) <= PART_BYTES
    assert {"index.html", "site.json", "LICENCES.txt", "vendor/tokenizers/LICENSE"} <= present
    site = json.loads((folder / "site.json").read_text(encoding="utf-8"))
    assert site["gallery"] == {
        "kind": "drawings",
        "size": 1_911,
        "has_pictures": True,
        "credit": site["gallery"]["credit"],
    }
    assert "Twemoji" in site["gallery"]["credit"]
    paths = [part["path"] for asset in site["assets"].values() for part in asset["parts"]]
    assert all(not path.startswith("/") and "://" not in path for path in paths)
    whole = b"".join(
        (folder / part["path"]).read_bytes() for part in site["assets"]["whole_tokenizer"]["parts"]
    )
    assert json.loads(gzip.decompress(whole)) == json.loads(towers_of("capivara").tokenizer_json)
    again = CliRunner().invoke(app, [*command, *few, "--npm-packages", str(npm_packages())])
    assert again.exit_code == 1
    assert "exists already. Pass --replace" in again.output


def test_a_page_refers_to_nothing_outside_its_folder(tmp_path: Path) -> None:
    import export.layouts.web

    page = Path(export.layouts.web.__path__[0]) / "page"
    for file in page.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://localhost:8000/", "")
        assert "://" not in text, file.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gallery", "vectors"], "--gallery is a setting of a web page; add --layout web"),
        (["--layout", "immich", "--npm-packages", "."], "--npm-packages is a setting of a web page"),
        (["--layout", "web", "--pictures", "photos"], "add --gallery VECTORS"),
        (["--layout", "web", "--engine", "openvino"], "web runs graphs with onnxruntime"),
        (["--target", "web", "--precision", "int8", "--precision", "fp32"], "Pass one --precision"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["export", str(CHECKPOINTS / "capivara"), str(tmp_path / "site"), *options]
    )
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "site").exists()


def test_the_gate_refuses_a_page_as_any_other_model(tmp_path: Path) -> None:
    """Limits of FP32 on a page in INT8: nothing is published, and the report says why."""
    (form,) = forms_for([Precision.INT8], [Engine.ONNXRUNTIME], installed=[Engine.ONNXRUNTIME])
    as_fp32 = dataclasses.replace(form, precision=Precision.FP32)
    options = dataclasses.replace(FEW, forms=(as_fp32,), vocabulary=VocabularyOptions(("por", "eng")))
    layout = web_layout(WebOptions(npm_packages=npm_packages()))
    with pytest.raises(Exception, match="does not agree with PyTorch and was not published"):
        layout_from_towers(towers_of("capivara"), tmp_path, layout, name="photos", options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["photos.fp32_onnxruntime.refused.json"]


def test_the_web_is_a_layout() -> None:
    assert LAYOUTS[LayoutName.WEB].precision is Precision.INT8
