"""Second step: tiny towers in every form that is timed, beside FP32 on the processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.gpu.forms import TimedForm, forms_to_time, graph_for_gpu
from bench.gpu.lines import Bench
from bench.gpu.sessions import TimedSession
from bench.gpu.towers import DRY_TOWERS, TimedTower, random_inputs, shapes_of
from runtime.cosines import row_cosines
from runtime.manifest import Modality, Precision

__all__ = ["try_forms"]

_N_RUNS = 3
"""Runs of a shape: the first capture its CUDA graph, the last replays it."""


def try_forms(bench: Bench) -> None:
    """Write a line per tower and form: the least cosine with the processor's vectors, or the error."""
    make_stream: Any = torch.cuda.Stream
    stream = make_stream() if torch.cuda.is_available() and not bench.dry else None
    handle = None if stream is None else int(stream.cuda_stream)
    for tower in DRY_TOWERS:
        reference = _session(bench, tower, TimedForm("processor", Precision.FP32), None)
        for form in forms_to_time(dry=bench.dry):
            if form.texts_only and tower.modality is not Modality.TEXT:
                continue
            facts = {"step": "smoke", "tower": tower.name, "what": f"{form.by} {form.precision.value}"}
            try:
                least = min(_cosines(tower, reference, _session(bench, tower, form, handle)))
            except Exception as error:  # what is wrong with one form says nothing of the others
                bench.emit(**facts, error=f"{type(error).__name__}: {error}"[:900])
                continue
            bench.emit(**facts, cosine=least)


def _session(bench: Bench, tower: TimedTower, form: TimedForm, stream: int | None) -> TimedSession:
    graph = graph_for_gpu(bench.skeleton(tower.slug), form, bench.work / "smoke")
    return TimedSession(graph, form, stream=stream)


def _cosines(tower: TimedTower, reference: TimedSession, session: TimedSession) -> list[float]:
    found = []
    for shape in shapes_of(tower, dry=True):
        inputs = random_inputs(tower, shape)
        expected = np.asarray(reference.contender(inputs).from_host())
        contender = session.contender(inputs)
        for _ in range(_N_RUNS):
            contender.launch()
        found.append(float(row_cosines(expected, np.asarray(contender.from_host())).min()))
    return found
