"""One run over a corpus: from a model and a source to a folder of vectors, whatever stops it on the way."""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from runtime.corpus.atomic import write_atomically
from runtime.corpus.engines import EngineChoice, choice_from_arguments, n_cores, open_encoder
from runtime.corpus.journal import Journal, PartRecord, header_of_journal
from runtime.corpus.options import Options, RunRecord, Watcher
from runtime.corpus.output import LAYOUT_VERSION, PartWriter
from runtime.corpus.pipeline import Workers, embedded_parts
from runtime.corpus.prepare import Counts, ImagePreparation, Preparation, TextPreparation
from runtime.corpus.rows import Rows, slices_from_rows
from runtime.corpus.sources import NumberedRows, Source, SourceFormat, open_source
from runtime.errors import CorpusError
from runtime.local import LocalEncoder
from runtime.manifest import Modality

__all__ = ["embed_corpus", "preparation_for", "slices_of_source", "workers_for"]

IMAGES_PER_SLICE = 16
_ROWS_BEFORE_JUDGING = 1_000
"""Rows after which the share of bad ones may stop a run; at its end it is judged in any case."""


def embed_corpus(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str] | Iterable[Any],
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    watcher: Watcher | None = None,
) -> RunRecord:
    """Embed a corpus into a folder; the same call goes on where an interrupted one stopped.

    Args:
        model: ``REPOSITORY/NAME``, or the address of a server that has it.
        source: A path, folder, glob or URL; or an iterable of texts, images or mappings.
        out: Folder of the output.

    Raises:
        CorpusError: the folder belongs to a run with other arguments, the disk is full, or too
            many rows are bad.
        InputError: the source cannot be read.
        ManifestError, EngineError, LanguageError: as of ``Encoder.open``.
    """
    options, watcher, folder = options or Options(), watcher or Watcher(), Path(out)
    opened = open_source(source, columns=options.columns, format=options.format)
    known = header_of_journal(folder / f"journal{options.shard.suffix}.jsonl")
    choice = choice_from_arguments(options.engine, known, model=model, modality=opened.modality)
    with open_encoder(model, choice, options.language) as encoder:
        arguments = _arguments(encoder, opened, options, choice)
        journal = Journal(folder, options.shard, arguments)
        try:
            return _Run(encoder, opened, options, choice, journal, arguments, folder, watcher).record()
        finally:
            journal.close()


def _arguments(
    encoder: LocalEncoder, source: Source, options: Options, choice: EngineChoice
) -> dict[str, Any]:
    """Everything that decides what is written."""
    return {
        "model": encoder.manifest.name,
        "fingerprint": encoder.fingerprint,
        **choice.deciding(),
        "modality": source.modality.value,
        "dim": encoder.dim if options.dim is None else options.dim,
        "encoding": options.encoding.value,
        "language": options.language,
        "format": source.format.value,
        "columns": asdict(source.columns),
        "source": source.identity(),
        "rows_per_part": options.rows_per_part,
        "max_batch_tokens": options.max_batch_tokens,
        "max_pixels": options.max_pixels,
        "npy": options.npy,
        "shards": options.shard.count,
    }


@dataclass(slots=True)
class _Run:
    encoder: LocalEncoder
    source: Source
    options: Options
    choice: EngineChoice
    journal: Journal
    arguments: Mapping[str, Any]
    folder: Path
    watcher: Watcher
    this_run: Counts = field(default_factory=Counts)

    def record(self) -> RunRecord:
        before = set(self.journal.done)
        started, cpu_started = time.perf_counter(), _cpu_seconds()
        done_before = sum(record.rows for record in self.journal.done.values())
        self.watcher.started(self.source, self.choice, self._rows_in_all(), done_before)
        if not self._is_finished():
            writer = self._writer()
            writer.remove_unfinished(self.options.shard.has)
            self._write(writer)
        self._judge(at_end=True)
        done = self.journal.done
        kinds: Counter[str] = Counter()
        for part in done.values():
            kinds.update(part.bad_kinds)
        record = RunRecord(
            arguments=self.arguments,
            source=self.source.name,
            engine=asdict(self.choice),
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
            "source": self.source.name,
        }
        return PartWriter(
            self.folder,
            self.source.id_type,
            self.options.encoding,
            {f"babeltower.{name}": value for name, value in metadata.items()},
            self.options.npy,
        )

    def _pending(self, part: int) -> bool:
        return self.options.shard.has(part) and part not in self.journal.done

    def _is_finished(self) -> bool:
        n_rows, size = self.journal.n_rows, self.options.rows_per_part
        return n_rows is not None and not any(map(self._pending, range(-(-n_rows // size))))

    def _rows_in_all(self) -> int | None:
        """Rows of this shard, where the source can tell without being read."""
        counts = [self.source.n_rows(file) for file in range(self.source.n_files)]
        known = [count for count in counts if count is not None]
        n_rows = sum(known) if len(known) == len(counts) else self.journal.n_rows
        if n_rows is None:
            return None
        size, shard = self.options.rows_per_part, self.options.shard
        whole = range(shard.index, n_rows // size, shard.count)
        tail = n_rows % size if shard.has(n_rows // size) else 0
        return len(whole) * size + tail

    def _write(self, writer: PartWriter) -> None:
        """Embed what is pending; one part is written while the next is computed."""
        counted = NumberedRows(self.source, self._needs)
        slices = slices_of_source(counted, self.source, self.options, self._pending)
        parts = embedded_parts(
            self.encoder,
            preparation_for(self.encoder, self.source, self.options),
            slices,
            dim=int(self.arguments["dim"]),
            rows_per_part=self.options.rows_per_part,
            has_ids=self.source.columns.id is not None or self.source.format is SourceFormat.IMAGES,
            workers=workers_for(self.source, self.choice),
            observe=self.watcher.observe,
        )
        writing: Future[PartRecord] | None = None
        with ThreadPoolExecutor(1, "babeltower-write") as pool:
            for part in parts:
                writing = self._noted(writing, pool.submit(writer.write, part))
            self._noted(writing, None)
        self.journal.end(counted.n_rows)

    def _noted(
        self, written: Future[PartRecord] | None, following: Future[PartRecord] | None
    ) -> Future[PartRecord] | None:
        if written is not None:
            record = written.result()
            self.journal.add(record)
            self.watcher.part_done(record)
            self._judge(at_end=False)
        return following

    def _needs(self, start: int, stop: int) -> bool:
        size = self.options.rows_per_part
        return any(map(self._pending, range(start // size, -(-stop // size))))

    def _judge(self, *, at_end: bool) -> None:
        rows = sum(part.rows for part in self.journal.done.values())
        bad = sum(part.counts.get("bad", 0) for part in self.journal.done.values())
        if bad > self.options.max_bad_share * rows and (at_end or rows >= _ROWS_BEFORE_JUDGING):
            kinds: Counter[str] = Counter()
            for part in self.journal.done.values():
                kinds.update(part.bad_kinds)
            raise CorpusError(
                f"{bad} of {rows} rows are bad, a share of {bad / rows:.1%}; the limit is "
                f"{self.options.max_bad_share:.1%}. Their kinds: {dict(kinds.most_common())}; each row's "
                f"reason is in {self.folder / 'bad-rows'}. Mend the source, or raise --max-bad-share."
            )

    def _save(self, record: RunRecord) -> None:
        data = {**asdict(record), "padding_share": record.padding_share}
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        path = self.folder / f"run{self.options.shard.suffix}.json"
        write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def slices_of_source(
    rows: Iterable[Rows], source: Source, options: Options, pending: Callable[[int], bool]
) -> Iterator[tuple[int, Rows]]:
    """Pending parts' rows in slices: a whole part of texts, a few images."""
    size = options.rows_per_part if source.modality is Modality.TEXT else IMAGES_PER_SLICE
    for piece in slices_from_rows(iter(rows), size=size, boundary=options.rows_per_part):
        part = piece.start // options.rows_per_part
        if pending(part):
            yield part, piece


def preparation_for(encoder: LocalEncoder, source: Source, options: Options) -> Preparation:
    """What comes before the tower."""
    if source.modality is Modality.TEXT:
        return TextPreparation(encoder, language=options.language, max_batch_tokens=options.max_batch_tokens)
    return ImagePreparation(encoder.manifest.image, max_pixels=options.max_pixels)


def workers_for(source: Source, choice: EngineChoice) -> Workers:
    """How many threads do what; the tokenizer takes all cores by itself."""
    towers = choice.instances or 1
    if source.modality is Modality.TEXT:
        return Workers(preparers=1, towers=towers, prepared_ahead=1)
    return Workers(preparers=n_cores(), towers=towers, prepared_ahead=2 * towers + 2)


def _counts(part: PartRecord) -> Counts:
    names = {f.name for f in fields(Counts)}
    return Counts(**{name: value for name, value in part.counts.items() if name in names})


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
