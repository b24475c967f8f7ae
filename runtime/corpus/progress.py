"""Progress display of a corpus run, and the summary at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any

from runtime.corpus.engines import EngineChoice
from runtime.corpus.journal import PartRecord
from runtime.corpus.options import RunRecord, Watcher
from runtime.corpus.slices import Counts
from runtime.corpus.sources import Source
from runtime.manifest import Modality

__all__ = ["Progress", "progress_bar", "summary_of_run"]

_LINE_EVERY_S = 30.0


class Progress:
    """Progress totals of a run; rates are for this process only."""

    def __init__(self) -> None:
        self.source: Source | None = None
        self.total: int | None = None
        self.rows_before = 0
        self.rows = 0
        self.counts = Counts()
        self._started = time.perf_counter()

    def start(self, source: Source, choice: EngineChoice, total: int | None, done: int) -> None:
        """Record the start of the run."""
        self.source, self.total, self.rows_before = source, total, done
        self._started = time.perf_counter()

    def observe(self, n_rows: int, counts: Counts) -> None:
        """Add the counts of a batch."""
        self.rows += n_rows
        self.counts += counts

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(1e-9, time.perf_counter() - self._started)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left at the rate so far; ``None`` if the number of rows is unknown."""
        if self.total is None or not self.rows:
            return None
        return max(0, self.total - self.rows_before - self.rows) / self.rows * self.seconds

    @property
    def padding_share(self) -> float:
        """Share of padding in the computed tokens."""
        computed = self.counts.tokens + self.counts.padding_tokens
        return self.counts.padding_tokens / computed if computed else 0.0

    def line(self) -> str:
        """Return the progress as one line."""
        counts, seconds = self.counts, self.seconds
        of = "" if self.total is None else f" of {self.total:,}"
        is_text = self.source is None or self.source.modality is Modality.TEXT
        work = (
            f"{(counts.tokens) / seconds:,.0f} tokens/s, padding {self.padding_share:.1%}, "
            f"truncated {counts.truncated:,}"
            if is_text
            else f"{counts.images / seconds:,.1f} images/s"
        )
        left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} left"
        return (
            f"{self.rows_before + self.rows:,}{of} rows, {self.rows / seconds:,.1f} rows/s, {work}, "
            f"bad {counts.bad:,}{left}"
        )


@contextmanager
def progress_bar(
    stream: IO[str] | None = None, *, inner: Watcher | None = None
) -> Iterator[tuple[Progress, Watcher]]:
    """Show a run's progress: a bar on a terminal, otherwise a line every 30 seconds.

    Args:
        stream: Output stream; default: stderr.
        inner: Watcher that receives the same events.
    """
    stream = sys.stderr if stream is None else stream
    progress, inner = Progress(), inner or Watcher()
    with _display(stream, progress) as show:

        def started(source: Source, choice: EngineChoice, total: int | None, done: int) -> None:
            progress.start(source, choice, total, done)
            columns = {k: v for k, v in _columns(source).items() if v is not None}
            rows = "rows unknown" if total is None else f"{total:,} rows"
            print(
                f"{source.name}: {source.format.value}, {rows}, columns {columns or 'none'}; {choice.name}"
                + (f"; measured rows/s {dict(choice.measured)}" if choice.measured else "")
                + (f"; {done:,} rows are done" if done else ""),
                *source.notes,
                *choice.reasons,
                sep="\n",
                file=stream,
                flush=True,
            )
            inner.started(source, choice, total, done)

        def observe(n_rows: int, counts: Counts) -> None:
            progress.observe(n_rows, counts)
            show()
            inner.observe(n_rows, counts)

        def part_done(record: PartRecord) -> None:
            inner.part_done(record)

        yield progress, replace(inner, started=started, observe=observe, part_done=part_done)


def _columns(source: Source) -> dict[str, str | None]:
    columns = source.columns
    return {"id": columns.id, "text": columns.text, "image": columns.image, "language": columns.language}


@contextmanager
def _display(stream: IO[str], progress: Progress) -> Iterator[Any]:
    if stream.isatty():
        try:
            import rich.console
            import rich.live
            import rich.progress
        except ImportError:
            pass
        else:
            bar = rich.progress.Progress(
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.description}"),
                console=rich.console.Console(file=stream),
            )
            task = bar.add_task("", total=None)
            with bar:
                yield lambda: bar.update(
                    task,
                    total=progress.total,
                    completed=progress.rows_before + progress.rows,
                    description=progress.line(),
                )
            return
    last = [time.perf_counter()]

    def show() -> None:
        if time.perf_counter() - last[0] >= _LINE_EVERY_S:
            last[0] = time.perf_counter()
            print(progress.line(), file=stream, flush=True)

    yield show


def summary_of_run(record: RunRecord) -> str:
    """Format a run's record as a few lines."""
    total, this = record.total, record.this_run
    seconds = max(1e-9, record.seconds)
    lines = [
        f"rows        {total.rows:,} in {record.parts:,} parts"
        + (f", {total.rows - this.rows:,} of them by earlier runs" if record.parts_done_before else ""),
        f"good        {total.rows - total.bad:,}; duplicates {total.duplicates:,}, "
        f"truncated {total.truncated:,}",
        f"bad         {total.bad:,}"
        + (f": {', '.join(f'{kind} {n:,}' for kind, n in record.bad_kinds.items())}" if total.bad else ""),
    ]
    if this.rows:
        rate = f"{this.rows / seconds:,.1f} rows/s"
        if this.tokens:
            rate += f", {this.tokens / seconds:,.0f} tokens/s, padding {record.padding_share:.1%}"
        if this.images:
            rate += f", {this.images / seconds:,.1f} images/s"
        busy = record.cpu_seconds / (seconds * record.cores)
        lines.append(f"time        {_duration(seconds)}; {rate}; {record.cores} cores {busy:.0%} busy")
    lines.append(f"memory      {record.peak_memory_bytes / 1e6:,.0f} MB at peak")
    lines += [
        f"set aside   {bad.name}, of which {bad.n_rows_read:,} rows were read: {bad.reason}"
        for bad in record.bad_files
    ]
    lines += [f"note        {note}" for note in record.notes]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}"
