"""Pass the samples through the parity gate on the GPU, with every caption and drawing.

The reference is the same model in FP32 on the processor, which agreed with PyTorch when it was exported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.lines import Bench
from bench.gpu.turns import POLL_S
from export.parity.limits import limits_of
from export.retrieval.comparison import Direction, LanguageFigures, compare_language
from export.retrieval.metrics import RetrievalProtocol, agreement
from export.retrieval.sample_set import sample_retrieval_set
from export.retrieval.sets import RetrievalSet
from export.retrieval.vectors import TextIndex, Vectors, exported_vectors, silent
from export.retrieval.verdict import retrieval_failures
from runtime.encoder import Encoder
from runtime.machine import n_cores
from runtime.manifest import Engine, Manifest, Precision, manifest_path

__all__ = [
    "CUDA_PRECISIONS",
    "PACKED",
    "PACKED_PRECISION",
    "REFERENCE",
    "GateForm",
    "embed_model",
    "judge_all",
    "judge_model",
    "judge_part",
    "models_of",
]

CUDA_PRECISIONS = (Precision.FP16, Precision.BF16, Precision.FP32)
"""Precisions that the gate judges on CUDA, in order of worth."""

PACKED, PACKED_PRECISION = "packed", Precision.FP16
"""Folder of the models with packed texts, inside of the other models' repository, and their precision."""

_DRY_SHARE = 30
_N_FAULTS = 5
_N_THREADS = 2
_VERDICT = "verdict"


@dataclass(frozen=True, slots=True)
class GateForm:
    """Form of a model: its name in the lines, what opens it, and the limits for its vectors.

    Attributes:
        name: Name in the lines.
        precision: Precision whose limits apply.
        engine: Engine that computes.
        folder: Repository that holds the form, beside the models' own; theirs if empty.
        opened_as: Precision that the repository lists it in; default: ``precision``.
    """

    name: str
    precision: Precision
    engine: Engine
    folder: str = ""
    opened_as: Precision | None = None

    def open(self, model: Path) -> Encoder:
        """Open the model in this form; the gate is what checks it."""
        return Encoder.open(
            model.parents[1] / self.folder / model.name if self.folder else model,
            engine=self.engine,
            precision=self.opened_as or self.precision,
            threads=_N_THREADS,
            verify=False,
        )


REFERENCE = GateForm("reference", Precision.FP32, Engine.ONNXRUNTIME)
"""What every form is compared with; it agreed with PyTorch when it was exported."""


def judge_all(bench: Bench) -> None:
    """Embed with every model in every form, and compare a form as soon as it and the reference are there.

    Forms are embedded in order of worth, as many at once as the processor has cores for: most of the work is
    its own. A run that is cut off keeps the verdicts that it has.
    """
    reference, *forms = _forms(bench)
    names = [model.name for model in models_of(bench)]
    waiting = [
        f"{name}/{form.name}" for pair in _in_order(reference, forms) for name in names for form in pair
    ]
    verdicts = {
        f"{name}/{form.name}/{_VERDICT}": {f"{name}/{reference.name}", f"{name}/{form.name}"}
        for form in forms
        for name in names
    }
    running: dict[str, subprocess.Popen[bytes]] = {}
    embedded: set[str] = set()
    while (waiting or running) and bench.left_s > 0:
        for part in [part for part, process in running.items() if process.poll() is not None]:
            code = running.pop(part).returncode
            if code == 0:
                embedded.add(part)
            elif code < 0:  # otherwise its process has written the reason
                bench.emit(step="gate", what=part, error=f"killed by signal {-code}")
        ready = [part for part, needed in verdicts.items() if needed <= embedded]
        for part in ready:
            del verdicts[part]
        waiting = ready + waiting
        while waiting and len(running) < max(1, n_cores() // _N_THREADS):
            part = waiting.pop(0)
            running[part] = _process(part)
        time.sleep(POLL_S)
    for process in running.values():
        process.kill()
    if waiting or running:
        bench.emit(step="gate", error=f"out of time; not done: {', '.join((*running, *waiting, *verdicts))}")


def _in_order(reference: GateForm, forms: Sequence[GateForm]) -> list[tuple[GateForm, ...]]:
    """Return the forms in order; those of a tuple are embedded model by model."""
    return [(reference, *forms[:1]), *((form,) for form in forms[1:])]


def judge_part(bench: Bench, part: str) -> None:
    """Embed with ``MODEL/FORM``, or compare it with the reference: ``MODEL/FORM/verdict``."""
    name, form, *verdict = part.split("/")
    reference, *forms = _forms(bench)
    (chosen,) = [known for known in (reference, *forms) if known.name == form]
    if verdict:
        judge_model(bench, name, [reference, chosen])
    else:
        embed_model(bench, name, chosen)


def models_of(bench: Bench) -> list[Path]:
    """Return the bundle's sample models; one of them in a dry run."""
    suffix = manifest_path(Path("x")).name.removeprefix("x")
    folder = bench.work / "samples" / "repository"
    found = [path.with_name(path.name.removesuffix(suffix)) for path in sorted(folder.glob(f"*{suffix}"))]
    return found[:1] if bench.dry else found


def embed_model(bench: Bench, name: str, form: GateForm) -> None:
    """Embed all captions and drawings, and keep the vectors."""
    model = bench.work / "samples" / "repository" / name
    manifest = Manifest.read(model)
    data = _captions_of(manifest, bench)
    index = TextIndex.of(data, with_language=manifest.text.needs_language)
    started = time.perf_counter()
    with form.open(model) as encoder:
        found = exported_vectors(encoder, data, index, dim=manifest.dim, progress=silent)
    seconds = time.perf_counter() - started
    counts = {"texts": len(index.texts), "images": len(data.images)}
    bench.emit(step="gate seconds", model=name, form=form.name, seconds=seconds, **counts)
    target = _vectors_file(bench, name, form)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        np.savez(stream, images=found.images, texts=found.texts)


def judge_model(bench: Bench, name: str, forms: Sequence[GateForm]) -> None:
    """Compare the vectors of each form with those of the first, the reference; write a line for each."""
    manifest = Manifest.read(bench.work / "samples" / "repository" / name)
    data = _captions_of(manifest, bench)
    index = TextIndex.of(data, with_language=manifest.text.needs_language)
    expected = _read_vectors(bench, name, forms[0], index)
    for form in forms[1:]:
        if not _vectors_file(bench, name, form).is_file():
            continue  # its process has written the reason
        found = _read_vectors(bench, name, form, index)
        bench.emit(step="gate", model=name, form=form.name, **_verdict(data, expected, found, form.precision))


def _forms(bench: Bench) -> list[GateForm]:
    """List the reference, then the forms on the GPU."""
    if bench.dry:
        return [REFERENCE, GateForm("again", Precision.FP32, Engine.ONNXRUNTIME)]
    fp16, *others = (GateForm(f"cuda {p.value}", p, Engine.CUDA) for p in CUDA_PRECISIONS)
    packed = GateForm(
        f"cuda {PACKED_PRECISION.value} packed", PACKED_PRECISION, Engine.CUDA, folder=f"repository/{PACKED}"
    )
    return [REFERENCE, fp16, packed, *others]


def _process(part: str) -> subprocess.Popen[bytes]:
    """Start a part in a process of its own; NumPy in it takes one core."""
    command = [sys.executable, "-m", "bench.gpu", *sys.argv[1:], "--part", part]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})


def _vectors_file(bench: Bench, name: str, form: GateForm) -> Path:
    return bench.work / "vectors" / f"{name}-{form.name.replace(' ', '-')}.npz"


def _read_vectors(bench: Bench, name: str, form: GateForm, index: TextIndex) -> Vectors:
    with np.load(_vectors_file(bench, name, form)) as arrays:
        return Vectors(arrays["images"], arrays["texts"], index)


def _captions_of(manifest: Manifest, bench: Bench) -> RetrievalSet:
    whole = sample_retrieval_set(bench.work / "samples" / "emoji")
    spoken = [
        entry.code
        for entry in whole.captions
        if not manifest.text.needs_language or entry.language in manifest.languages
    ]
    return whole.select(spoken[:: _DRY_SHARE if bench.dry else 1])


def _verdict(data: RetrievalSet, reference: Vectors, found: Vectors, precision: Precision) -> dict[str, Any]:
    languages = [
        compare_language(data, captions, reference, found, RetrievalProtocol.ANY)
        for captions in data.captions
    ]
    images = agreement(reference.images, found.images)
    faults = retrieval_failures(languages, images, limits_of(precision, Engine.CUDA).retrieval)
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
