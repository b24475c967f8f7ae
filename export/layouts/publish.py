"""Export a checkpoint to the model folder of another server: write to staging, check parity, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint import towers_from_checkpoint
from export.layouts.layout import Layout, LayoutRequest, ModelPlace
from export.layouts.names import LayoutName
from export.layouts.registry import LAYOUTS
from export.parity.consumer import ConsumerParity, measure_consumer
from export.parity.limits import limits_of
from export.repository import Draft, ExportOptions, drafted
from export.retrieval.vectors import Progress, silent
from export.towers import Towers
from export.variants import Form
from export.vocabulary.pruned_towers import pruned_towers
from runtime.errors import ExportError, ParityError
from runtime.manifest import Modality, record_of_file
from runtime.repository import commit
from runtime.storage import replace_text

__all__ = ["RECORD_FILE", "LaidOut", "layout_for_timing", "layout_from_checkpoint", "layout_from_towers"]

RECORD_FILE = "babeltower.json"
"""Record in a published model's folder: source, versions, parity, checksums. No server reads it."""


@dataclass(frozen=True, slots=True)
class LaidOut:
    """Published model folder, its place in the server's folder, its record, and seconds by step."""

    folder: Path
    place: ModelPlace
    record: Mapping[str, Any]
    parity: ConsumerParity | None
    seconds: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        seconds = {step: round(found, 2) for step, found in self.seconds.items()}
        return {"model": str(self.folder), **self.record, "seconds": seconds}


def layout_from_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    layout: LayoutName | Layout,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    image_tower: str | Path | None = None,
    context_length: int | None = None,
    options: ExportOptions,
    progress: Progress = silent,
) -> LaidOut:
    """Export both towers as a model of another server, once what it computes agrees with PyTorch.

    Args:
        checkpoint: Folder, ``.ckpt`` file or hub name.
        folder: Folder in which the server looks for models.
        layout: Layout with its own settings, or the name of one with the default settings.
        name: Name by which the server shall know the model; by default the one that it has for it.
        base: Base checkpoint of a LoRA adapter.
        image_tower: See ``towers_from_checkpoint``.
        context_length: Maximum text length in tokens; the family's own by default.
        options: Settings; exactly one form, for the server's engine.

    Raises:
        CheckpointError: the checkpoint cannot be read exactly.
        ExportError: the server has no such model, the place is taken, or a graph could not be written.
        ParityError: the model does not agree with PyTorch. It is not published, and its report is written to
            ``FOLDER/NAME.VARIANT.refused.json``.
    """
    _require_form(_layout(layout), options)
    started = time.perf_counter()
    towers = towers_from_checkpoint(
        checkpoint, base=base, context_length=context_length, image_tower=image_tower
    )
    towers = dataclasses.replace(towers, source={"checkpoint": Path(str(checkpoint)).name, **towers.source})
    loaded = time.perf_counter() - started
    done = layout_from_towers(towers, folder, layout, name=name, options=options, progress=progress)
    return dataclasses.replace(done, seconds={"load": loaded, **done.seconds})


def layout_from_towers(
    towers: Towers,
    folder: str | Path,
    layout: LayoutName | Layout,
    *,
    name: str | None = None,
    options: ExportOptions,
    progress: Progress = silent,
) -> LaidOut:
    """Export loaded towers; see ``layout_from_checkpoint``."""
    target, chosen = Path(folder), _layout(layout)
    form = _require_form(chosen, options)
    if options.vocabulary is not None:
        towers = pruned_towers(towers, options.vocabulary)
    place = chosen.place(towers, name)
    _require_place(target / place.folder, replace=options.replace)
    with drafted(towers, target, name=place.name, options=options, progress=progress) as draft:
        request = _written(chosen, towers, draft, place, form, options)
        model, place = request.folder, request.place
        started = time.perf_counter()
        parity = _measured(chosen, draft, request, options, progress)
        seconds = {**draft.seconds, "parity": time.perf_counter() - started}
        if violations := parity.report.violations():
            raise ParityError(_refusal(target, place, form, parity, violations))
        record = _record(chosen, draft, place, form, model, parity.as_json())
        _publish(model, target, place, draft.stage, record)
    return LaidOut(target / place.folder, place, record, parity, seconds)


def layout_for_timing(
    towers: Towers,
    folder: Path,
    layout: LayoutName | Layout,
    *,
    name: str | None = None,
    options: ExportOptions,
) -> LaidOut:
    """Write a model of random weights for timing: parity is not measured, and its record says so."""
    chosen = _layout(layout)
    form = _require_form(chosen, options)
    if options.vocabulary is not None:
        towers = pruned_towers(towers, options.vocabulary)
    place = chosen.place(towers, name)
    with drafted(towers, folder, name=place.name, options=options, measured=False) as draft:
        request = _written(chosen, towers, draft, place, form, options)
        model, place = request.folder, request.place
        parity = {"measured": "nothing: the weights are random"}
        record = _record(chosen, draft, place, form, model, parity)
        _publish(model, folder, place, draft.stage, record)
    return LaidOut(folder / place.folder, place, record, None, draft.seconds)


def _layout(layout: LayoutName | Layout) -> Layout:
    return layout if isinstance(layout, Layout) else LAYOUTS[layout]


def _require_form(layout: Layout, options: ExportOptions) -> Form:
    forms = options.forms
    if len(forms) != 1 or forms[0].opened_by != (layout.engine,):
        raise ExportError(
            f"A model of {layout.name.value} is of one precision, run by {layout.engine.value}; "
            f"got {[form.key for form in forms]}. Pass one --precision."
        )
    return forms[0]


def _require_place(folder: Path, *, replace: bool) -> None:
    if folder.exists() and not replace:
        raise ExportError(f"{folder} exists already. Pass --replace, another --name, or another folder.")


def _written(
    layout: Layout, towers: Towers, draft: Draft, place: ModelPlace, form: Form, options: ExportOptions
) -> LayoutRequest:
    model = draft.stage / "layout" / place.name
    model.mkdir(parents=True)
    graphs = {modality: draft.graph(modality) for modality in Modality}
    request = LayoutRequest(towers, graphs, place, model, form.precision, options.threads)
    notes = layout.write(request)
    return dataclasses.replace(request, place=dataclasses.replace(place, notes=(*place.notes, *notes)))


def _measured(
    layout: Layout, draft: Draft, request: LayoutRequest, options: ExportOptions, progress: Progress
) -> ConsumerParity:
    limits = limits_of(request.precision, layout.engine)
    if options.accept_drop is not None:
        limits = limits.accepting(options.accept_drop)
    assert draft.expected is not None
    with contextlib.closing(layout.open(request)) as consumer:
        return measure_consumer(
            request.towers,
            consumer,
            request.precision,
            engine=layout.engine,
            limits=limits,
            expected=draft.expected,
            gate=draft.gate,
            progress=progress,
        )


def _record(
    layout: Layout, draft: Draft, place: ModelPlace, form: Form, model: Path, parity: Mapping[str, Any]
) -> dict[str, Any]:
    manifest, variant = draft.manifest, draft.variant
    files = [record_of_file(model, path) for path in sorted(model.rglob("*")) if path.is_file()]
    return {
        "layout": layout.name.value,
        "name": place.name,
        "notes": list(place.notes),
        "family": manifest.family,
        "architecture": manifest.architecture,
        "dim": manifest.dim,
        "fingerprint": manifest.fingerprint,
        "vocabulary": [dataclasses.asdict(kept) for kept in manifest.vocabulary],
        "licence": manifest.licence,
        "source": dict(manifest.source),
        "precision": form.precision.value,
        "recipe": dict(variant.recipe),
        "calibration": dict(variant.calibration),
        "versions": dict(variant.versions),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "measured_on": dict(variant.measured_on),
        "parity": parity,
        "files": [dataclasses.asdict(file) for file in files],
    }


def _publish(model: Path, target: Path, place: ModelPlace, stage: Path, record: Mapping[str, Any]) -> None:
    replace_text(model / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    folder = target / place.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    commit(stage, target, place.name, "export", {model: folder})


def _refusal(
    target: Path, place: ModelPlace, form: Form, parity: ConsumerParity, violations: list[str]
) -> str:
    """Write the report of a refused model and return the error message."""
    path = target / f"{place.name}.{form.key}.refused.json"
    record = {"violations": violations, **parity.as_json()}
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    worst = parity.report.worst_languages()
    return (
        f"{place.name} in {form.key} does not agree with PyTorch and was not published: "
        f"{'; '.join(violations[:6])} ({len(violations)} limits violated; full report in {path})."
        + (f" Largest drops of R@1: {'; '.join(worst)}." if worst else "")
    )
