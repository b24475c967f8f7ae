"""Progress lines and summary of an index build."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from runtime.fingerprints import remark_on_kind
from runtime.indexes.build import Progress
from runtime.indexes.plan import Kind
from runtime.indexes.record import IndexRecord

__all__ = ["lines_of_progress", "text_from_record"]

_EVERY_S = 5.0


def lines_of_progress(write: Callable[[str], None]) -> Progress:
    """Return a progress callback that writes a line at the start of each step and every five seconds."""
    said_step, said_at = "", time.monotonic()

    def progress(step: str, done: int, of: int) -> None:
        nonlocal said_step, said_at
        if step != said_step or time.monotonic() - said_at >= _EVERY_S:
            said_step, said_at = step, time.monotonic()
            write(f"{step}: {done:,} of {of:,}" if done else f"{step}: {of:,}")

    return progress


def text_from_record(record: IndexRecord, folder: Path) -> str:
    """Format an index's record as a few lines."""
    parameters = ", ".join(f"{name} {value}" for name, value in record.parameters.items())
    mb = record.size_bytes / 1e6
    lines = [
        f"{folder}: {record.kind} index of {record.n_rows:,} {record.modality}s, {record.dim} wide, "
        f"{record.encoding}",
        f"fingerprint  {record.fingerprint} ({record.model}){remark_on_kind(record.fingerprint)}",
        f"size         {mb:,.1f} MB on disk, {record.size_bytes / max(1, record.n_rows):,.0f} bytes per row",
        *([f"settings     {parameters}"] if parameters else []),
        *_measured(record),
        "seconds      " + ", ".join(f"{step} {spent:.1f}" for step, spent in record.seconds.items()),
    ]
    trained = int(record.parameters.get("n_training_rows", 0))
    if trained < record.n_well_trained_rows:
        lines.append(
            f"note         trained on {trained:,} rows; FAISS recommends {record.n_well_trained_rows:,} to "
            "train lists and codes well"
        )
    if len(record.segments) > 1 or any(segment.n_removed for segment in record.segments):
        n_removed = sum(segment.n_removed for segment in record.segments)
        lines.append(
            f"note         {len(record.segments)} segments, {n_removed:,} rows removed; the recall is of "
            "the first build. --update --merge makes them one"
        )
    if len(record.computations) > 1:
        lines.append(
            f"note         the vectors have {len(record.computations)} different computations, as accepted "
            "when they were embedded; index.json lists them"
        )
    return "\n".join(lines)


def _measured(record: IndexRecord) -> list[str]:
    recall = record.recall
    if not recall.points:
        return ["recall       not measured: too few rows to hold any out"]
    unit = {Kind.FLAT: "", Kind.IVF_PQ: "lists", Kind.HNSW: "candidates", Kind.CASCADE: "candidates"}[
        Kind(record.kind)
    ]
    lines = [
        f"recall@{recall.k:<5} against exact search, {recall.n_queries:,} queries ({recall.queries}), "
        f"{recall.threads} thread{'' if recall.threads == 1 else 's'}"
    ]
    for point in recall.points:
        chosen = "  ← default of searches" if unit and point.effort == record.effort else ""
        effort = f"{point.effort:>5} {unit}: " if unit else ""
        lines.append(
            f"             {effort}{point.recall:.4f}, {point.search_ms:.2f} ms per single query, "
            f"{point.queries_per_second:,.0f} queries/s in a batch{chosen}"
        )
    return lines
