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
from typing import Any, TypeAlias

from runtime.corpus.computation import computation_of, differences
from runtime.corpus.engines import EngineChoice, choice_from_arguments, open_encoder
from runtime.corpus.files import require_utf8
from runtime.corpus.folder.kept import KeptColumns
from runtime.corpus.input_agreement import agree_on_input, remedy_of_kinds, require_same_stream
from runtime.corpus.input_record import InputRecord, is_read_once
from runtime.corpus.job import (
    Executor,
    Job,
    more_or_fewer_rows,
    parts_in_process,
    runs_on_gpu,
    source_of_run,
)
from runtime.corpus.journal import BAD_ROWS, Journal, PartRecord
from runtime.corpus.options import Options, RunRecord, Watcher
from runtime.corpus.output import LAYOUT_VERSION, PartTakenOverError, PartWriter, encoding_metadata
from runtime.corpus.pipeline import EmbeddedPart, whole_parts
from runtime.corpus.slices import Counts
from runtime.corpus.sources import Source
from runtime.corpus.stores import Store, store_from_location
from runtime.encoder import Encoder
from runtime.errors import CorpusError
from runtime.local import LocalEncoder
from runtime.machine import n_cores, peak_memory_bytes, return_free_memory
from runtime.manifest import model_location

__all__ = ["embed_corpus"]

_ROWS_BEFORE_JUDGING = 1_000
"""Rows after which too many bad rows may stop a run; the share is always checked at the end."""

_POLL_S = 0.5
"""Seconds between looks at the journal while other workers hold every part that is left."""

_Writing: TypeAlias = "tuple[int, Future[PartRecord]]"


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
        out: Output folder: a path, or a URL of fsspec such as ``s3://bucket/folder``. Any number of processes
            may embed the same corpus into it at once; each claims the next parts.
        execute: Executor of the job; default: threads of this process.

    Raises:
        CorpusError: the folder belongs to a run with other arguments, or its parts have another
            computation; the disk is full, or too many rows are bad.
        InputError: the source cannot be read, or the folder's name is not UTF-8.
        ManifestError, EngineError, LanguageError: as in ``Encoder.open``.
    """
    options, watcher = options or Options(), watcher or Watcher()
    store = store_from_location(out, patience_s=options.reading.patience_s)
    location = model_location(model)
    require_utf8(store.location)
    opened = source_of_run(source, options, store.location)
    record = InputRecord(store)
    if not options.recheck_input:
        record.require_same_files(opened, append=options.append)
    KeptColumns.of(opened, options.keep)  # fails here if a column is missing: nothing is written yet
    with Journal(store, lease_s=options.lease_s) as journal:
        encoder, choice = _opened(location, opened, options, journal.known_arguments())
        with encoder:
            arguments = _arguments(encoder, opened, options, choice)
            computation = computation_of(encoder, choice, opened.modality)
            job = Job(
                location,
                encoder,
                opened,
                options,
                choice,
                int(arguments["dim"]),
                lambda part: options.shard.has(part) and journal.wants(part),
                lambda part: options.shard.has(part) and journal.claim(part),
                watcher.observe,
                computation,
            )
            agree_on_input(job, journal, record, arguments)
            run = _Run(job, journal, arguments, store, record, watcher, execute or parts_in_process)
            return run.record()


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
        "reading": options.reading.deciding(),
        "source": source.identity(),
        "rows_per_part": options.rows_per_part,
        "max_batch_tokens": options.batch_tokens(on_gpu=runs_on_gpu(encoder)),
        "max_pixels": options.max_pixels,
        "npy": options.npy,
        "keep": list(options.keep),
    }


@dataclass(slots=True)
class _Run:
    job: Job
    journal: Journal
    arguments: Mapping[str, Any]
    store: Store
    input_record: InputRecord
    watcher: Watcher
    execute: Executor

    def record(self) -> RunRecord:
        before = set(self.journal.done)
        if self._is_finished():
            if is_read_once(self.job.source):
                require_same_stream(self.job, self.journal.done, self.journal.n_rows)
        else:
            self.journal.begin(self.job.computation, self.job.options.accept_changed)
        encoder = self.job.encoder if self.execute is parts_in_process else None
        if isinstance(encoder, LocalEncoder) and not self._is_finished():
            encoder.open_tower(self.job.source.modality)  # not part of the measured time
        started, cpu_started = time.perf_counter(), _cpu_seconds()
        done_before = sum(record.rows for record in self._done().values())
        self.watcher.started(self.job.source, self.job.choice, self._rows_in_all(), done_before)
        while not self._is_finished():
            self.journal.begin_pass()
            self._write(self._writer())
            self._await_others()
        self._judge(at_end=True)
        done = self._done()
        kinds: Counter[str] = Counter()
        for part in done.values():
            kinds.update(part.bad_kinds)
        here = self.journal.finished_here
        record = RunRecord(
            arguments=self.arguments,
            source=self.job.source.name,
            engine=asdict(self.job.choice),
            total=sum((_counts(part) for part in done.values()), Counts()),
            this_run=sum((_counts(part) for number, part in done.items() if number in here), Counts()),
            bad_kinds=dict(sorted(kinds.items())),
            parts=len(done),
            parts_done_before=len(before & done.keys()),
            seconds=time.perf_counter() - started,
            cpu_seconds=_cpu_seconds() - cpu_started,
            cores=n_cores(),
            peak_memory_bytes=peak_memory_bytes(),
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            computations=tuple(self.journal.computations),
            notes=tuple(_notes(self.journal)),
            bad_files=self.input_record.with_bad_files(self.job.source.bad_files),
        )
        self._save(record)
        return record

    def _done(self) -> dict[int, PartRecord]:
        """Return the finished parts of this shard."""
        has = self.job.options.shard.has
        return {number: part for number, part in sorted(self.journal.done.items()) if has(number)}

    def _await_others(self) -> None:
        """Wait while every unfinished part of this shard is held by another worker that is alive."""
        while True:
            unfinished = list(self.journal.unfinished(self.job.options.shard))
            if not unfinished or any(is_free for _, is_free in unfinished):
                return
            time.sleep(_POLL_S)
            self.journal.begin_pass()

    def _writer(self) -> PartWriter:
        arguments = self.arguments
        metadata = {
            "version": LAYOUT_VERSION,
            **{
                name: str(arguments[name])
                for name in ("model", "precision", "engine", "fingerprint", "dim", "encoding", "modality")
            },
            "source": self.job.source.name,
            **encoding_metadata(self.job.options.encoding),
        }
        return PartWriter(
            self.store,
            self.job.source.id_type,
            self.job.options.encoding,
            {f"babeltower.{name}": value for name, value in metadata.items()},
            self.job.options.npy,
            self.journal.holds,
            KeptColumns.of(self.job.source, self.job.options.keep),
            self.job.options.rows_per_part,
        )

    def _is_finished(self) -> bool:
        return self.journal.n_rows is not None and not any(self.journal.unfinished(self.job.options.shard))

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
        """Embed the parts that can be claimed, writing one while the next is computed."""
        writing: _Writing | None = None
        parts = self.execute(self.job)
        with ThreadPoolExecutor(1, "babeltower-write") as pool, contextlib.ExitStack() as stack:
            if isinstance(parts, Generator):  # its threads end with this run, also after an interruption
                stack.enter_context(contextlib.closing(parts))
            try:
                for part in whole_parts(parts):
                    writing, before = (part.number, pool.submit(self._written, writer, part)), writing
                    self._note(before)
            except BaseException:  # what stops the source keeps the parts before
                self._note(writing)
                raise
            self._note(writing)
        if self.job.known_end not in (None, self.job.n_rows):
            raise more_or_fewer_rows(self.job.known_end)
        self.input_record.require_unchanged_while_read(self.job.source)
        self.journal.end(self.job.n_rows)

    def _written(self, writer: PartWriter, part: EmbeddedPart) -> PartRecord:
        self.input_record.write_pictures(part.number, part.pictures)
        return writer.write(part)

    def _note(self, writing: _Writing | None) -> None:
        """Record a part once it is written, unless another worker took it over."""
        if writing is None:
            return
        part, future = writing
        try:
            record = future.result()
        except PartTakenOverError:
            self.journal.drop(part)
            return
        except CorpusError:
            if self.journal.holds(part):
                raise
            self.journal.drop(part)  # the other worker removed the half-written file
            return
        return_free_memory()
        if self.journal.finish(record):
            self.watcher.part_done(record)
            self._judge(at_end=False)

    def _judge(self, *, at_end: bool) -> None:
        done = self._done()
        rows = sum(part.rows for part in done.values())
        bad = sum(part.counts.get("bad", 0) for part in done.values())
        if bad > self.job.options.max_bad_share * rows and (at_end or rows >= _ROWS_BEFORE_JUDGING):
            kinds: Counter[str] = Counter()
            for part in done.values():
                kinds.update(part.bad_kinds)
            raise CorpusError(
                f"{bad} of {rows} rows are bad, a share of {bad / rows:.1%}; the limit is "
                f"{self.job.options.max_bad_share:.1%}. Kinds: {dict(kinds.most_common())}; each row's "
                f"reason is in {self.store.path(BAD_ROWS)}. Fix the source, or raise --max-bad-share."
                + remedy_of_kinds(kinds, self.job.source.columns)
            )

    def _save(self, record: RunRecord) -> None:
        data = {**asdict(record), "padding_share": record.padding_share}
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        self.store.replace(f"_run{self.job.options.shard.suffix}.json", text.encode())


def _notes(journal: Journal) -> Iterator[str]:
    for changed in map(differences, journal.computations, journal.computations[1:]):
        yield f"the computation changed between parts, as accepted: {'; '.join(changed.values())}"


def _counts(part: PartRecord) -> Counts:
    names = {f.name for f in fields(Counts)}
    return Counts(**{name: value for name, value in part.counts.items() if name in names})


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
