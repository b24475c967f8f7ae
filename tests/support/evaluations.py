"""A small evaluation of retrieval, made without a model."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from bench.accuracy.retrieval_report import Evaluation, ModelFacts, RetrievalReport
from bench.datasets import Captions, ImageBytes, RetrievalSet
from bench.datasets.language_maps import LanguageMap
from bench.records.environment import environment
from export.retrieval.comparison import compare_language
from export.retrieval.metrics import RetrievalProtocol, agreement
from export.retrieval.vectors import TextIndex, Vectors
from export.retrieval.verdict import RetrievalLimits
from runtime.manifest import Engine, Precision

N_IMAGES = 24


def unit(rows):
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def png(index: int, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (index * 9 % 256, 90, 200)).save(file, "PNG")
    return file.getvalue()


def small_set() -> RetrievalSet:
    images = tuple(ImageBytes(f"picture {i}", png(i)) for i in range(N_IMAGES))
    captions = (
        Captions("en", "eng_Latn", tuple(f"<name> & {i}" for i in range(N_IMAGES)), tuple(range(N_IMAGES))),
        Captions("ar", "arb_Arab", tuple(f"اسم {i % 20}" for i in range(N_IMAGES)), tuple(range(N_IMAGES))),
        Captions("zhm", "zho_Hans", ("名字一", "名字二"), (3, 3)),
    )
    return RetrievalSet("small", images, captions, ("A note.",), "Whose pictures these are.")


def evaluation(noise: float = 0.0, *, limits: RetrievalLimits | None = None) -> Evaluation:
    """``noise`` is added to the exported texts."""
    rng = np.random.default_rng(3)
    dataset = small_set()
    index = TextIndex.of(dataset, with_language=True)
    images = unit(rng.standard_normal((N_IMAGES, 16)))
    texts = np.empty((len(index.texts), 16), dtype=np.float32)
    for entry in dataset.captions:
        texts[index.rows[entry.code]] = images[list(entry.image_of)]
    texts = unit(texts + 0.3 * rng.standard_normal(texts.shape))
    reference = Vectors(images, texts, index)
    exported = Vectors(images, unit(texts + noise * rng.standard_normal(texts.shape)), index)
    return Evaluation(dataset, reference, exported, report_of(dataset, reference, exported, limits))


def report_of(dataset, reference, exported, limits) -> RetrievalReport:
    figures = tuple(
        compare_language(dataset, entry, reference, exported, RetrievalProtocol.ANY)
        for entry in dataset.captions
    )
    return RetrievalReport(
        model=ModelFacts(
            name="tiny",
            family="nllb-clip",
            architecture="tiny",
            licence="cc-by-nc-4.0",
            dim=16,
            fingerprint="f" * 64,
            checkpoint="tiny",
            engine=Engine.ONNXRUNTIME,
            precision=Precision.FP32,
            threads=1,
        ),
        dataset=dataset.name,
        notes=dataset.notes,
        language_map=LanguageMap.PAPER,
        protocol=RetrievalProtocol.ANY,
        reference_padding="to the longest text of a batch",
        n_images=len(dataset.images),
        n_texts=len(reference.texts),
        unspoken=("tlh",),
        languages=figures,
        images=agreement(reference.images, exported.images),
        limits=limits or RetrievalLimits(0.999999, 0.0, 0.0, 0.0, 0.0, 2e-6),
        seconds={"exported": 1.0},
        environment=environment(),
        created="2024-01-01T00:00:00+00:00",
    )
