"""Resumable run over a corpus, from a model and a source to a folder of vectors."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from runtime.corpus.atomic import write_atomically
from runtime.corpus.computation import computation_of, differences
from runtime.corpus.engines import EngineChoice, choice_from_arguments, open_encoder
from runtime.corpus.files import require_utf8
from runtime.corpus.job import Executor, Job, parts_in_process, runs_on_gpu
from runtime.corpus.journal import Journal, PartRecord, header_of_journal
from runtime.corpus.options import Options, RunRecord, Watcher
from runtime.corpus.output import LAYOUT_VERSION, PartWriter
from runtime.corpus.slices import Counts
from runtime.corpus.sources import Source, open_source
from runtime.encoder import Encoder
from runtime.errors import CorpusError
from runtime.local import LocalEncoder
from runtime.machine import n_cores
from runtime.manifest import model_location

__all__ = ["embed_corpus"]

_ROWS_BEFORE_JUDGING = 1_000
"""Rows after which too many bad rows may stop a run; the share is always checked at the end."""


def embed_corpus(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str] | Iterable[Any],
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    watcher: Watcher | None = None,
    execute: Executor | None = None,
) -> RunRecord:
    """Embed a corpus into a folder; the same call resumes an interrupted run.

    Args:
        model: ``REPOSITORY/NAME``, or the address of a server that serves it.
        source: A path, folder, glob or URL; a table in memory; or an iterable of texts, images or mappings.
        out: Output folder.
        execute: Executor of the job; default: threads of this process.

    Raises:
        CorpusError: the folder belongs to a run with other arguments, or its parts have another
            computation; the disk is full, or too many rows are bad.
        InputError: the source cannot be read, or the folder's name is not UTF-8.
        ManifestError, EngineError, LanguageError: as in ``Encoder.open``.
    """
    options, watcher, folder = options or Options(), watcher or Watcher(), Path(out)
    location = model_location(model)
    require_utf8(str(folder))
    opened = open_source(source, columns=options.columns, format=options.format)
    known = header_of_journal(folder / f"journal{options.shard.suffix}.jsonl")
    encoder, choice = _opened(location, opened, options, known)
    with encoder:
        arguments = _arguments(encoder, opened, options, choice)
        computation = computation_of(encoder, choice, opened.modality)  # may fail; nothing is written yet
        journal = Journal(folder, options.shard, arguments)
        try:
            job = Job(
                location,
                encoder,
                opened,
                options,
                choice,
                int(arguments["dim"]),
                lambda part: options.shard.has(part) and part not in journal.done,
                watcher.observe,
                computation,
            )
            run = _Run(job, journal, arguments, folder, watcher, execute or parts_in_process)
            return run.record()
        finally:
            journal.close()


def _opened(
    model: str, source: Source, options: Options, known: Mapping[str, Any] | None
) -> tuple[Encoder, EngineChoice]:
    """Open the encoder, on a server or in process, and return it with its engine choice."""
    if "://" in model:
        from runtime.corpus.remote import open_remote

        return open_remote(model, options.engine, options.connection)
    choice = choice_from_arguments(
        options.engine, known, model=model, modality=source.modality, cache=options.cache
    )
    return open_encoder(model, choice, options.language, cache=options.cache), choice


def _arguments(encoder: Encoder, source: Source, options: Options, choice: EngineChoice) -> dict[str, Any]:
    """Return every argument that determines the output."""
    return {
        "model": encoder.name,
        "fingerprint": encoder.fingerprint,
        **choice.deciding(),
        "modality": source.modality.value,
        "dim": encoder.require_width(options.dim),
        "encoding": options.encoding.value,
        "language": options.language,
        "format": source.format.value,
        "columns": asdict(source.columns),
        "source": source.identity(),
        "rows_per_part": options.rows_per_part,
        "max_batch_tokens": options.batch_tokens(on_gpu=runs_on_gpu(encoder)),
        "max_pixels": options.max_pixels,
        "npy": options.npy,
        "shards": options.shard.count,
    }


@dataclass(slots=True)
class _Run:
    job: Job
    journal: Journal
    arguments: Mapping[str, Any]
    folder: Path
    watcher: Watcher
    execute: Executor

    def record(self) -> RunRecord:
        before, was_former = set(self.journal.done), self.journal.is_former
        if not self._is_finished():
            self.journal.begin(self.job.computation, self.job.options.accept_changed)
        encoder = self.job.encoder if self.execute is parts_in_process else None
        if isinstance(encoder, LocalEncoder) and not self._is_finished():
            encoder.open_tower(self.job.source.modality)  # not part of the measured time
        started, cpu_started = time.perf_counter(), _cpu_seconds()
        done_before = sum(record.rows for record in self.journal.done.values())
        self.watcher.started(self.job.source, self.job.choice, self._rows_in_all(), done_before)
        if not self._is_finished():
            writer = self._writer()
            writer.remove_unfinished(self.job.options.shard.has)
            self._write(writer)
        self._judge(at_end=True)
        done = self.journal.done
        kinds: Counter[str] = Counter()
        for part in done.values():
            kinds.update(part.bad_kinds)
        record = RunRecord(
            arguments=self.arguments,
            source=self.job.source.name,
            engine=asdict(self.job.choice),
            total=sum((_counts(part) for part in done.values()), Counts()),
            this_run=sum((_counts(part) for number, part in done.items() if number not in before), Counts()),
            bad_kinds=dict(sorted(kinds.items())),
            parts=len(done),
            parts_done_before=len(before),
            seconds=time.perf_counter() - started,
            cpu_seconds=_cpu_seconds() - cpu_started,
            cores=n_cores(),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            computations=tuple(self.journal.computations),
            notes=tuple(_notes(self.journal, was_former=was_former)),
        )
        self._save(record)
        return record

    def _writer(self) -> PartWriter:
        arguments = self.arguments
        metadata = {
            "version": LAYOUT_VERSION,
            **{
                name: str(arguments[name])
                for name in ("model", "precision", "engine", "fingerprint", "dim", "encoding", "modality")
            },
            "source": self.job.source.name,
        }
        return PartWriter(
            self.folder,
            self.job.source.id_type,
            self.job.options.encoding,
            {f"babeltower.{name}": value for name, value in metadata.items()},
            self.job.options.npy,
        )

    def _is_finished(self) -> bool:
        n_rows, size = self.journal.n_rows, self.job.options.rows_per_part
        return n_rows is not None and not any(map(self.job.pending, range(-(-n_rows // size))))

    def _rows_in_all(self) -> int | None:
        """Return this shard's number of rows; ``None`` if the source must be read to tell."""
        counts = [self.job.source.n_rows(file) for file in range(self.job.source.n_files)]
        known = [count for count in counts if count is not None]
        n_rows = sum(known) if len(known) == len(counts) else self.journal.n_rows
        if n_rows is None:
            return None
        size, shard = self.job.options.rows_per_part, self.job.options.shard
        whole = range(shard.index, n_rows // size, shard.count)
        tail = n_rows % size if shard.has(n_rows // size) else 0
        return len(whole) * size + tail

    def _write(self, writer: PartWriter) -> None:
        """Embed the pending parts, writing one while the next is computed."""
        writing: Future[PartRecord] | None = None
        parts = self.execute(self.job)
        with ThreadPoolExecutor(1, "babeltower-write") as pool, contextlib.ExitStack() as stack:
            if isinstance(parts, Generator):  # its threads end with this run, also after an interruption
                stack.enter_context(contextlib.closing(parts))
            for part in parts:
                writing = self._noted(writing, pool.submit(writer.write, part))
            self._noted(writing, None)
        self.journal.end(self.job.n_rows)

    def _noted(
        self, written: Future[PartRecord] | None, following: Future[PartRecord] | None
    ) -> Future[PartRecord] | None:
        if written is not None:
            record = written.result()
            self.journal.add(record)
            self.watcher.part_done(record)
            self._judge(at_end=False)
        return following

    def _judge(self, *, at_end: bool) -> None:
        rows = sum(part.rows for part in self.journal.done.values())
        bad = sum(part.counts.get("bad", 0) for part in self.journal.done.values())
        if bad > self.job.options.max_bad_share * rows and (at_end or rows >= _ROWS_BEFORE_JUDGING):
            kinds: Counter[str] = Counter()
            for part in self.journal.done.values():
                kinds.update(part.bad_kinds)
            raise CorpusError(
                f"{bad} of {rows} rows are bad, a share of {bad / rows:.1%}; the limit is "
                f"{self.job.options.max_bad_share:.1%}. Kinds: {dict(kinds.most_common())}; each row's "
                f"reason is in {self.folder / 'bad-rows'}. Fix the source, or raise --max-bad-share."
            )

    def _save(self, record: RunRecord) -> None:
        data = {**asdict(record), "padding_share": record.padding_share}
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        path = self.folder / f"run{self.job.options.shard.suffix}.json"
        write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def _notes(journal: Journal, *, was_former: bool) -> Iterator[str]:
    if was_former:
        yield (
            "the journal was begun by an older babeltower, which did not record graphs, engine version and "
            "processor: it is unknown whether all parts were computed alike"
        )
    for changed in map(differences, journal.computations, journal.computations[1:]):
        yield f"the computation changed between parts, as accepted: {'; '.join(changed.values())}"


def _counts(part: PartRecord) -> Counts:
    names = {f.name for f in fields(Counts)}
    return Counts(**{name: value for name, value in part.counts.items() if name in names})


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
