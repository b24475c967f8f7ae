"""One export in two forms, immich's folder and a repository for the Encoder, and the vectors of each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from immich_reader import Textual, Visual
from numpy.typing import NDArray
from PIL import Image

from export.layouts.layout import LayoutRequest
from export.layouts.names import LayoutName
from export.layouts.registry import LAYOUTS
from export.parity.probes import names_by_language
from export.precision.calibration import CalibrationSize
from export.repository import ExportOptions, drafted
from export.towers import Towers
from export.variants import Form, forms_for
from runtime.local import LocalEncoder
from runtime.manifest import Engine, Modality, Precision
from runtime.opening.tower_check import Checks
from runtime.repository import publish

PASSED = {"jpn_Jpan": "jpn_Hira", "lvs_Latn": "lav_Latn"}
"""Codes that the service passes in place of FLORES-200's."""


def form_of(precision: Precision) -> Form:
    (form,) = forms_for([precision], [Engine.ONNXRUNTIME], installed=[Engine.ONNXRUNTIME])
    return form


def write_both(
    towers: Towers, work: Path, name: str | None, precision: Precision, size: CalibrationSize
) -> tuple[Path, Path]:
    """Write a draft, not measured, as immich's folder and as a repository; return the two models."""
    layout = LAYOUTS[LayoutName.IMMICH]
    place = layout.place(towers, name)
    options = ExportOptions(forms=(form_of(precision),), calibration_size=size)
    repository, folder = work / "repository", work / "cache" / place.folder
    folder.mkdir(parents=True)
    with drafted(towers, repository, name=place.name, options=options, measured=False) as draft:
        graphs = {modality: draft.graph(modality) for modality in Modality}
        layout.write(LayoutRequest(towers, graphs, place, folder))
        publish(draft.stage, repository, draft.manifest, draft.variant)
    return folder, repository / place.name


def encoder_of(model: Path, precision: Precision) -> LocalEncoder:
    return LocalEncoder.from_repository(
        model, engine=Engine.ONNXRUNTIME, precision=precision, verify=Checks.NONE
    )


def texts_with_codes() -> list[tuple[str, str]]:
    names = names_by_language()
    rows = [(text, code) for code in sorted(names)[::4] for text in names[code][:1]]
    long = " ".join(text for text, _ in rows)
    awkward = ["", "  two   spaces\n", "a “quoted” l’été", "e\u0301", "a <pad> b", "<pad>", "👩‍🚀"]
    return [*rows, *((text, "por_Latn") for text in (*awkward, long))]


def files() -> list[bytes]:
    """Images whose crop starts at a whole pixel: at half a pixel, the service rounds in its own way."""
    noise = np.random.default_rng(0)
    found = []
    for width, height, kind in ((90, 141, "PNG"), (200, 113, "JPEG"), (64, 64, "WEBP"), (7, 3, "PNG")):
        image = Image.fromarray(noise.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height))
        buffer = io.BytesIO()
        image.save(buffer, kind)
        found.append(buffer.getvalue())
    return found


def vectors_of_service(folder: Path) -> Sequence[NDArray[np.float32]]:
    """Vectors of all texts and all files, as the service computes them."""
    textual, visual = Textual(folder), Visual(folder)
    texts = [textual.predict_in(text, PASSED.get(code, code)) for text, code in texts_with_codes()]
    return np.stack(texts), np.stack([visual.predict(file) for file in files()])


def vectors_of_encoder(model: Path, precision: Precision) -> Sequence[NDArray[np.float32]]:
    """Vectors of all texts and all files, one a run, as quantized towers may differ in batches."""
    with encoder_of(model, precision) as encoder:
        texts = [encoder.embed_texts([text], [code]) for text, code in texts_with_codes()]
        return np.concatenate(texts), np.concatenate([encoder.embed_images([file]) for file in files()])
