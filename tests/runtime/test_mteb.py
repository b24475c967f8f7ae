"""MTEB's own evaluation of exported models, on a local data set, beside this project's retrieval."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_models import CHECKPOINTS, Exported
from small_exports import FEW, few_drawings

from babeltower import Encoder
from export import repository_from_checkpoint
from export.retrieval.metrics import RetrievalProtocol, recall, top_items
from export.retrieval.sets import RetrievalSet
from export.retrieval.vectors import TextIndex, exported_vectors, silent
from export.variants import FORMS
from runtime.errors import InputError, LanguageError
from runtime.evaluation import MtebModel
from runtime.manifest import Engine

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")

SUBSETS = {"pt": ["por-Latn"], "zh": ["zho-Hans"], "ar": ["ara-Arab"]}
FLORES = {"pt": "por_Latn", "zh": "zho_Hans", "ar": "arb_Arab"}


@pytest.fixture(scope="module")
def drawings() -> RetrievalSet:
    """Drawings and their names in three languages, each name once, so that no two captions tie."""
    found = few_drawings().select(list(FLORES.values()))
    captions = []
    for entry in found.captions:
        once = dict(zip(entry.texts, entry.image_of, strict=True))
        captions.append(dataclasses.replace(entry, texts=tuple(once), image_of=tuple(once.values())))
    return dataclasses.replace(found, captions=tuple(captions))


@pytest.fixture(scope="module")
def task_of(drawings: RetrievalSet) -> Callable[[str, dict[str, list[str]]], Any]:
    """Category and languages by subset → a task of MTEB's with the drawings."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    images = [Image.open(io.BytesIO(image.read())) for image in drawings.images]

    def rows(category: str, subset: str) -> Any:
        (entry,) = (c for c in drawings.captions if c.language == FLORES[subset])
        texts = {"id": [f"t{i}" for i in range(len(entry.texts))], "text": list(entry.texts)}
        pictures = {"id": [f"i{i}" for i in range(len(images))], "image": images}
        if category == "t2i":
            relevant = {f"t{row}": {f"i{image}": 1} for row, image in enumerate(entry.image_of)}
            queries, corpus = texts, pictures
        else:
            relevant = {}
            for row, image in enumerate(entry.image_of):
                relevant.setdefault(f"i{image}", {})[f"t{row}"] = 1
            asked = [image for image in range(len(images)) if f"i{image}" in relevant]
            queries = {"id": [f"i{i}" for i in asked], "image": [images[i] for i in asked]}
            corpus = texts
        return {
            "queries": datasets.Dataset.from_dict(queries),
            "corpus": datasets.Dataset.from_dict(corpus),
            "relevant_docs": relevant,
            "top_ranked": None,
        }

    def task(category: str, languages: dict[str, list[str]]) -> Any:
        class Drawings(AbsTaskRetrieval):
            metadata = TaskMetadata(
                name=f"Drawings{category.upper()}",
                description="Held-out drawings by their names.",
                reference=None,
                dataset={"path": "local", "revision": "1"},
                type="Any2AnyMultilingualRetrieval",
                category=category,
                eval_splits=["test"],
                eval_langs=languages,
                main_score="recall_at_1",
                modalities=["text", "image"],
            )

            def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
                self.dataset = {subset: {"test": rows(category, subset)} for subset in languages}
                self.data_loaded = True

        return Drawings()

    return task


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The NLLB-CLIP sample in INT8 for ONNX Runtime."""
    form = next(form for form in FORMS if form.key == "int8_onnxruntime")
    options = dataclasses.replace(FEW, forms=(form,), accept_drop=0.5)
    folder = tmp_path_factory.mktemp("int8")
    return repository_from_checkpoint(CHECKPOINTS / "nllb-clip", folder, name="nllb", options=options).model


def scores_of(task: Any, model: MtebModel, folder: Path) -> dict[str, Any]:
    """MTEB's scores by subset, without its cache."""
    result = mteb.evaluate(
        model, task, cache=mteb.ResultCache(folder), overwrite_strategy="always", show_progress_bar=False
    )
    (of_task,) = result.task_results
    return {scores["hf_subset"]: scores for scores in of_task.scores["test"]}


def own_recall(encoder: Encoder, drawings: RetrievalSet, category: str) -> dict[str, Any]:
    """This project's recall on the same drawings, by subset."""
    index = TextIndex.of(drawings, with_language=True)
    found = exported_vectors(encoder, drawings, index, dim=encoder.dim, progress=silent)
    recalls = {}
    for subset, code in FLORES.items():
        (entry,) = (c for c in drawings.captions if c.language == code)
        relevance = drawings.relevance(entry)
        if category == "t2i":
            top = top_items(found.of(entry), found.images)
        else:
            relevance = relevance.reversed()
            top = top_items(found.images, found.of(entry))
        recalls[subset] = recall(top, relevance, RetrievalProtocol.FRACTION)
    return recalls


@pytest.mark.parametrize("category", ["t2i", "i2t"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_mteb_finds_the_recall_of_this_projects_retrieval(
    category: str,
    precision: str,
    exported: Exported,
    int8: Path,
    drawings: RetrievalSet,
    task_of: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = exported("nllb-clip") if precision == "fp32" else int8
    with Encoder.open(model, precision=precision, threads=1) as encoder:
        scores = scores_of(task_of(category, SUBSETS), MtebModel(encoder), tmp_path)
        own = own_recall(encoder, drawings, category)
    assert scores.keys() == own.keys()
    for subset, figures in own.items():
        assert figures.at[1] > 0.05
        for k, share in figures.at.items():
            assert scores[subset][f"recall_at_{k}"] == pytest.approx(share, abs=1e-5), subset


def test_the_language_of_each_subset_reaches_the_model(exported: Exported, task_of: Any) -> None:
    task = task_of("t2i", SUBSETS)
    with Encoder.open(exported("nllb-clip")) as encoder:
        model = MtebModel(encoder)
        for subset, code in FLORES.items():
            found = model.encode(
                [{"text": ["a", "b"]}, {"text": ["c"]}],
                task_metadata=task.metadata,
                hf_split="test",
                hf_subset=subset,
            )
            np.testing.assert_array_equal(found, encoder.embed_texts(["a", "b", "c"], code))
        (other,) = encoder.embed_texts(["a"], "eng_Latn")
        assert not np.array_equal(found[0], other)


def test_a_subset_of_several_languages_is_decided_by_the_caller(exported: Exported, task_of: Any) -> None:
    norwegian = task_of("t2i", {"pt": ["nor-Latn", "nno-Latn", "nob-Latn"]})
    asked: dict[str, Any] = {"task_metadata": norwegian.metadata, "hf_split": "test", "hf_subset": "pt"}
    with Encoder.open(exported("nllb-clip")) as encoder:
        with pytest.raises(LanguageError, match=r"needs one language.*languages=\{'pt': CODE\}"):
            MtebModel(encoder).encode([{"text": ["en hund"]}], **asked)
        model = MtebModel(encoder, languages={"pt": "nn"})
        found = model.encode([{"text": ["en hund"]}], **asked)
        np.testing.assert_array_equal(found, encoder.embed_texts(["en hund"], "nno_Latn"))
        with pytest.raises(LanguageError, match="unknown"):
            MtebModel(encoder, languages={"pt": "xx-unknown"})
    with Encoder.open(exported("altclip")) as encoder:  # its texts name no language
        found = MtebModel(encoder).encode([{"text": ["en hund"]}], **asked)
        np.testing.assert_array_equal(found, encoder.embed_texts(["en hund"]))


def test_widths_sums_and_what_cannot_be_embedded(exported: Exported, task_of: Any) -> None:
    asked: dict[str, Any] = {
        "task_metadata": task_of("t2i", SUBSETS).metadata,
        "hf_split": "test",
        "hf_subset": "pt",
    }
    picture = Image.new("RGB", (40, 30), (200, 30, 60))
    with Encoder.open(exported("nllb-siglip-mrl")) as encoder:
        model = MtebModel(encoder, dim=64)
        both = model.encode([{"text": ["maçã"], "image": [picture]}], **asked)
        summed = encoder.embed_texts(["maçã"], "por_Latn", dim=64) + encoder.embed_images([picture], dim=64)
        np.testing.assert_allclose(both, summed / np.linalg.norm(summed), atol=1e-6)
        np.testing.assert_allclose(model.similarity(both, both), [[1]], atol=1e-6)
        np.testing.assert_allclose(model.similarity_pairwise(both, both), [1], atol=1e-6)
        assert model.encode([], **asked).shape == (0, 64)
        with pytest.raises(InputError, match="expected text or image"):
            model.encode([{"audio": [b""]}], **asked)
        with pytest.raises(InputError, match="no vectors of width 100"):
            MtebModel(encoder, dim=100)


def test_a_model_is_described_by_space_precision_and_engine(exported: Exported, int8: Path) -> None:
    from mteb.models import EncoderProtocol

    with Encoder.open(exported("nllb-clip")) as whole, Encoder.open(int8, precision="int8") as small:
        metas = [MtebModel(encoder).mteb_model_meta for encoder in (whole, small)]
        assert isinstance(MtebModel(whole), EncoderProtocol)
    assert metas[0].revision == metas[1].revision == whole.fingerprint
    assert metas[0] != metas[1]
    assert metas[1].experiment_kwargs == {"precision": "int8", "engine": Engine.ONNXRUNTIME.value}
    assert "por-Latn" in metas[0].languages
    assert metas[0].similarity_fn_name == "cosine"
