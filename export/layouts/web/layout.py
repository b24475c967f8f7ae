"""Layout of a static web page: text tower, tokenizer, gallery and page in ``FOLDER/NAME``.

The page computes in the browser, with ONNX Runtime for WebAssembly. Its files are relative to each other, so
that any static host serves them at any path. Its JavaScript is in ``page/``, copied as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from export.graphs.edits import drop_unused
from export.layouts.layout import Layout, LayoutRequest, ModelPlace
from export.layouts.names import LayoutName
from export.layouts.web.assets import Asset, write_asset
from export.layouts.web.cleaning import cleaning_rules
from export.layouts.web.gallery import (
    GallerySource,
    WebGallery,
    gallery_of_folder,
    sample_gallery,
    write_pictures,
)
from export.layouts.web.model import SITE_FILE, WebModel
from export.layouts.web.packages import PACKAGES, copy_packages, require_packages
from export.layouts.web.probes import LEAST_COSINE, MEAN_COSINE, WebProbes, web_probes
from export.parity.probes import names_by_language
from export.repository import name_of_checkpoint
from export.towers import Towers, output_name
from export.vocabulary.characters import characters_of_languages
from export.vocabulary.selection import tokenizer_from_json
from runtime.backends import open_backend
from runtime.cosines import row_cosines
from runtime.errors import ExportError
from runtime.manifest import Engine, KeptBy, Modality, Precision, require_name
from runtime.preprocessing.languages import languages_from_codes

__all__ = ["FORMAT", "WEB", "WebOptions", "page_text", "web_layout"]

FORMAT = "babeltower-web/1"
"""Version of ``site.json``; the page reads no other."""

_WEIGHTS = "weights.bin"
_VENDOR = "vendor"
_N_EXAMPLES = 4


@dataclass(frozen=True, slots=True)
class WebOptions:
    """Settings of a page.

    Attributes:
        gallery: Gallery to search, read or to be read; the sample drawings if None.
        npm_packages: Folder of the JavaScript libraries; see ``copy_packages``.
    """

    gallery: GallerySource | WebGallery | None = None
    npm_packages: Path | None = None


def web_layout(options: WebOptions) -> Layout:
    """Return the layout with settings."""

    def place(towers: Towers, name: str | None) -> ModelPlace:
        found = _place(towers, name)
        require_packages(options.npm_packages)
        if isinstance(options.gallery, GallerySource):  # before minutes of work
            gallery_of_folder(options.gallery, fingerprint=towers.fingerprint, dims=towers.dims)
        return found

    def write(request: LayoutRequest) -> tuple[str, ...]:
        return _write(request, options)

    return Layout(LayoutName.WEB, Engine.ONNXRUNTIME, place, write, WebModel, Precision.INT8)


def _place(towers: Towers, name: str | None) -> ModelPlace:
    found = name or name_of_checkpoint(towers.source.get("checkpoint", towers.family))
    require_name(found)
    return ModelPlace(found, Path(found))


def _write(request: LayoutRequest, options: WebOptions) -> tuple[str, ...]:
    """Write the page's folder, check it, and return notes on the gallery.

    Raises:
        ExportError: a JavaScript library is missing, or the written tower gives other vectors.
        InputError: the gallery cannot be read, or is of another embedding space.
    """
    towers, folder = request.towers, request.folder
    copy_packages(folder / _VENDOR, options.npm_packages)
    gallery = _gallery(request, options)
    output = output_name(gallery.dim, towers.dim)
    tokenizer = tokenizer_from_json(towers.tokenizer_json, towers.text_preprocessing)
    longest = tokenizer.longest_kept
    with closing(_backend(request, Modality.TEXT)) as tower:
        probes = web_probes(towers, tokenizer, tower, output=output, longest=longest)
    pictures, notes = write_pictures(gallery, folder)
    assets = {
        **_model_assets(request, output),
        **_probe_assets(folder, probes),
        **_gallery_assets(folder, gallery, pictures),
        "wasm": _wasm(folder),
    }
    site = {
        "format": FORMAT,
        "title": gallery.title,
        "name": request.place.name,
        "family": towers.family,
        "licence": towers.licence,
        "fingerprint": towers.fingerprint,
        "precision": request.precision.value,
        "dim": gallery.dim,
        "output": output,
        "weights_name": _WEIGHTS,
        "mean_cosine": MEAN_COSINE,
        "least_cosine": LEAST_COSINE,
        "choose_language": towers.text_preprocessing.needs_language,
        "languages": _languages(towers),
        "text": page_text(towers, longest=longest),
        "gallery": {
            "kind": gallery.kind,
            "size": len(gallery.names),
            "has_pictures": any(pictures),
            "credit": gallery.credit,
        },
        "assets": {name: asset.as_json() for name, asset in assets.items()},
    }
    _write_json(folder / SITE_FILE, site)
    _copy_page(folder)
    _require_same_vectors(request, probes, output)
    return (*gallery.notes, *notes)


def _backend(request: LayoutRequest, modality: Modality) -> Any:
    return open_backend(
        Engine.ONNXRUNTIME, request.graphs[modality], precision=request.precision, threads=request.threads
    )


def _gallery(request: LayoutRequest, options: WebOptions) -> WebGallery:
    towers = request.towers
    if isinstance(options.gallery, WebGallery):
        return options.gallery
    if options.gallery is not None:
        return gallery_of_folder(options.gallery, fingerprint=towers.fingerprint, dims=towers.dims)
    with closing(_backend(request, Modality.IMAGE)) as tower:
        return sample_gallery(tower, towers.image_preprocessing)


def _model_assets(request: LayoutRequest, output: str) -> dict[str, Asset]:
    """Write the text tower with one output, its tokenizer, and the whole vocabulary's where it was pruned."""
    towers, folder = request.towers, request.folder
    model = onnx_ir.load(request.graphs[Modality.TEXT])
    outputs = model.graph.outputs
    outputs[:] = [value for value in outputs if value.name == output]
    drop_unused(model)
    model.metadata_props["babeltower.layout"] = LayoutName.WEB.value
    work = folder / "work"
    work.mkdir()
    onnx_ir.save(model, work / "graph.onnx", external_data=_WEIGHTS, size_threshold_bytes=1024)
    found: dict[str, Asset] = {}
    for name, file in {"graph": "graph.onnx", "weights": _WEIGHTS}.items():
        if (work / file).exists():
            with (work / file).open("rb") as stream:
                found[name] = write_asset(folder, f"model/{file}", stream)
            (work / file).unlink()
    work.rmdir()
    found["tokenizer"] = write_asset(folder, "model/tokenizer.json", _compact(towers.tokenizer_json))
    if towers.kept is not None:
        whole = _compact(towers.whole.tokenizer_json)
        found["whole_tokenizer"] = write_asset(folder, "model/whole_tokenizer.json", whole)
    return found


def _compact(tokenizer_json: str) -> bytes:
    return json.dumps(json.loads(tokenizer_json), ensure_ascii=False, separators=(",", ":")).encode()


def _probe_assets(folder: Path, probes: WebProbes) -> dict[str, Asset]:
    rows = json.dumps(list(probes.rows), ensure_ascii=False).encode()
    vectors = np.ascontiguousarray(probes.vectors, "<f4").tobytes()
    return {
        "probes": write_asset(folder, "model/probes.json", rows),
        "probe_vectors": write_asset(folder, "model/probes.bin", vectors),
    }


def _gallery_assets(folder: Path, gallery: WebGallery, pictures: list[str | None]) -> dict[str, Asset]:
    items = [
        {"name": name, **({} if picture is None else {"picture": picture})}
        for name, picture in zip(gallery.names, pictures, strict=True)
    ]
    vectors = np.ascontiguousarray(gallery.vectors, "<f2").tobytes()
    return {
        "items": write_asset(folder, "gallery/items.json", json.dumps(items, ensure_ascii=False).encode()),
        "vectors": write_asset(folder, "gallery/vectors.bin", vectors),
    }


def _wasm(folder: Path) -> Asset:
    """Replace ONNX Runtime's WebAssembly by a compressed file."""
    path = f"{_VENDOR}/onnxruntime-web/ort-wasm-simd-threaded.wasm"
    program = (folder / path).read_bytes()
    (folder / path).unlink()
    return write_asset(folder, path, program)


def _languages(towers: Towers) -> list[dict[str, Any]]:
    names = names_by_language()
    return [
        {
            "code": row.flores,
            "tag": row.bcp47,
            "name": row.name,
            "examples": list(names.get(row.flores, ()))[:_N_EXAMPLES],
        }
        for row in languages_from_codes(towers.languages)
    ]


def page_text(towers: Towers, *, longest: int) -> dict[str, Any]:
    """Return everything but the tokenizer that the page needs to read texts, as plain values.

    Args:
        longest: Characters of the longest text that the page takes.
    """
    text = towers.text_preprocessing
    return {
        "context_length": text.context_length,
        "pad_id": text.pad_id,
        "prefix_ids": list(text.prefix_ids),
        "suffix_ids": list(text.suffix_ids),
        "language_ids": dict(text.language_ids),
        "fixed_length": text.fixed_length,
        "longest": longest,
        "n_tokens": towers.n_tokens,
        "cleaning": cleaning_rules(text.clean),
        "kept": _kept(towers),
    }


def _kept(towers: Towers) -> Mapping[str, Any] | None:
    """Return the letters whose pieces were all kept, if the vocabulary was pruned by them."""
    if towers.kept is None:
        return None
    by_letters = towers.kept.record.kept_by is KeptBy.CHARACTERS
    alphabets = characters_of_languages(towers.languages).values()
    letters = sorted(frozenset().union(*alphabets)) if by_letters else []
    return {"by_letters": by_letters, "letters": "".join(letters)}


def _copy_page(folder: Path) -> None:
    """Copy the page, and write the licences of what it contains."""
    for file in resources.files("export.layouts.web").joinpath("page").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    lines = [f"{one.name} {one.version}: {one.licence}, in {_VENDOR}/{one.folder}/." for one in PACKAGES]
    notice = resources.files("export.layouts.web").joinpath("licences.txt").read_text(encoding="utf-8")
    (folder / "LICENCES.txt").write_text("\n".join((*lines, "", notice)), encoding="utf-8")


def _require_same_vectors(request: LayoutRequest, probes: WebProbes, output: str) -> None:
    """Check that the tower, joined from its parts, gives the exported model's vectors here."""
    with closing(WebModel(request)) as model:
        found = model.vectors_of_rows(probes.embedded, output)
    cosines = row_cosines(found, probes.vectors)
    if not (cosines.mean() >= MEAN_COSINE and cosines.min() >= LEAST_COSINE):
        raise ExportError(
            f"The written text tower agrees with the exported one to a cosine of {cosines.min():.6f}, "
            f"{cosines.mean():.6f} in the mean; {LEAST_COSINE} and {MEAN_COSINE} are required. The "
            "disk or memory may be faulty: export again."
        )


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


WEB = web_layout(WebOptions())
