"""Pass the samples through the parity gate on the GPU, with every caption and drawing.

The reference is the same model in FP32 on the processor, which agreed with PyTorch when it was exported.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.lines import Bench
from export.parity.limits import LIMITS
from export.retrieval.comparison import Direction, LanguageFigures, compare_language
from export.retrieval.metrics import RetrievalProtocol, agreement
from export.retrieval.sample_set import sample_retrieval_set
from export.retrieval.sets import RetrievalSet
from export.retrieval.vectors import TextIndex, Vectors, exported_vectors, silent
from export.retrieval.verdict import retrieval_failures
from runtime.encoder import Encoder
from runtime.manifest import Engine, Manifest, Precision, manifest_path

__all__ = ["judge_model", "models_of"]

_DRY_SHARE = 30
_N_FAULTS = 5
_PRECISIONS = (Precision.FP32, Precision.FP16)
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class GateForm:
    """Form of a model: its name in the lines, and how it is opened."""

    name: str
    precision: Precision
    provider: str
    threads: int | None = None

    def open(self, model: Path) -> Encoder:
        """Open the model in this form."""
        return Encoder.open(
            model,
            engine=Engine.ONNXRUNTIME,
            precision=self.precision,
            provider=self.provider,
            threads=self.threads,
            verify=False,
        )


def models_of(bench: Bench) -> list[Path]:
    """Return the bundle's sample models; one of them in a dry run."""
    suffix = manifest_path(Path("x")).name.removeprefix("x")
    folder = bench.work / "samples" / "repository"
    found = [path.with_name(path.name.removesuffix(suffix)) for path in sorted(folder.glob(f"*{suffix}"))]
    return found[:1] if bench.dry else found


def judge_model(bench: Bench, name: str) -> None:
    """Judge one model in every form that the GPU runs."""
    model = bench.work / "samples" / "repository" / name
    manifest = Manifest.read(model)
    data = _captions_of(manifest, bench)
    index = TextIndex.of(data, with_language=manifest.text.needs_language)
    reference = _vectors(bench, GateForm("cpu fp32", Precision.FP32, _CPU, 3), model, data, index, manifest)
    for form in _forms(manifest, dry=bench.dry):
        try:
            found = _vectors(bench, form, model, data, index, manifest)
        except Exception as error:  # one form that fails says nothing about the others
            bench.emit(
                step="gate", model=name, form=form.name, error=f"{type(error).__name__}: {error}"[:900]
            )
            continue
        bench.emit(
            step="gate", model=name, form=form.name, **_verdict(data, reference, found, form.precision)
        )


def judge_all(bench: Bench) -> None:
    """Judge every model, each in a process of its own, all at once: most of the work is the processor's."""
    arguments = [sys.executable, "-m", "bench.gpu", *sys.argv[1:]]
    running = [subprocess.Popen([*arguments, "--part", model.name]) for model in models_of(bench)]
    for process in running:
        try:
            process.wait(timeout=max(1.0, bench.left_s))
        except subprocess.TimeoutExpired:
            process.kill()


def _captions_of(manifest: Manifest, bench: Bench) -> RetrievalSet:
    whole = sample_retrieval_set(bench.work / "samples" / "emoji")
    spoken = [
        entry.code
        for entry in whole.captions
        if not manifest.text.needs_language or entry.language in manifest.languages
    ]
    return whole.select(spoken[:: _DRY_SHARE if bench.dry else 1])


def _forms(manifest: Manifest, *, dry: bool) -> Iterator[GateForm]:
    for variant in manifest.variants.values():
        if Engine.ONNXRUNTIME.value in variant.engines and variant.precision in _PRECISIONS:
            yield GateForm(f"gpu {variant.precision.value}", variant.precision, _CPU if dry else _CUDA)


def _vectors(
    bench: Bench, form: GateForm, model: Path, data: RetrievalSet, index: TextIndex, manifest: Manifest
) -> Vectors:
    started = time.perf_counter()
    with form.open(model) as encoder:
        opened = time.perf_counter() - started
        found = exported_vectors(encoder, data, index, dim=manifest.dim, progress=silent)
    bench.emit(
        step="gate seconds",
        model=model.name,
        form=form.name,
        texts=len(index.texts),
        images=len(data.images),
        open_s=opened,
        seconds=time.perf_counter() - started - opened,
    )
    return found


def _verdict(data: RetrievalSet, reference: Vectors, found: Vectors, precision: Precision) -> dict[str, Any]:
    languages = [
        compare_language(data, captions, reference, found, RetrievalProtocol.ANY)
        for captions in data.captions
    ]
    images = agreement(reference.images, found.images)
    faults = retrieval_failures(languages, images, LIMITS[precision].retrieval)
    return {
        "languages": len(languages),
        "mean_recall_at_1": {d.value: _means(languages, d) for d in Direction},
        "worst_drop": {d.value: max((f.comparison(d).drop(1), f.code) for f in languages) for d in Direction},
        "recall_at_1": {
            f.code: [
                round(side.at[1], 5)
                for d in Direction
                for side in (f.comparison(d).reference, f.comparison(d).exported)
            ]
            for f in languages
        },
        "image_cosine_min": images.cosine_min,
        "text_cosine_min": min(f.texts.cosine_min for f in languages),
        "passes": not faults,
        "faults": faults[:_N_FAULTS],
    }


def _means(languages: Sequence[LanguageFigures], direction: Direction) -> list[float]:
    """Return mean recall at 1 of the reference and of the form."""
    chosen = [figures.comparison(direction) for figures in languages]
    return [
        sum(c.reference.at[1] for c in chosen) / len(chosen),
        sum(c.exported.at[1] for c in chosen) / len(chosen),
    ]
