"""What a run is told, what it tells while it goes on, and what it leaves on record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.corpus.computation import Computation, ComputationChange
from runtime.corpus.engines import EngineChoice
from runtime.corpus.journal import PartRecord, Shard
from runtime.corpus.pipeline import Observer
from runtime.corpus.prepare import Counts
from runtime.corpus.rows import Columns
from runtime.corpus.sources import Source, SourceFormat
from runtime.embeddings import Encoding
from runtime.errors import InputError

__all__ = ["Options", "RunRecord", "Watcher"]

ROWS_PER_PART = 32_768
MAX_BATCH_TOKENS = 1_024
MAX_BAD_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """How a corpus is embedded.

    Attributes:
        columns: Which columns hold what; looked for under their usual names by default.
        format: How the source is stored; told from suffixes by default.
        language: Code of the texts that name none.
        dim: Width of the vectors; the full width by default.
        encoding: How vectors are stored.
        engine: Engine, precision, instances and threads; what is left open is measured.
        rows_per_part: Rows of the source that one file covers, and the most that an interruption costs.
        max_batch_tokens: Texts × padded length of one run, in tokens.
        max_pixels: Width × height above which an image is bad; Pillow's limit by default.
        max_bad_share: Share of bad rows above which the run stops.
        shard: Which parts are this run's own.
        accept_changed: What may be another one than in the parts that are there: engine version, processor
            or libraries. Their vectors then differ a little from those made now; the journal says so.
        npy: Also write the vectors as NumPy arrays.
        cache: As of ``Encoder.open``.
    """

    columns: Columns = field(default_factory=Columns)
    format: SourceFormat | None = None
    language: str | None = None
    dim: int | None = None
    encoding: Encoding = Encoding.FLOAT32
    engine: EngineChoice = field(default_factory=EngineChoice)
    rows_per_part: int = ROWS_PER_PART
    max_batch_tokens: int = MAX_BATCH_TOKENS
    max_pixels: int | None = None
    max_bad_share: float = MAX_BAD_SHARE
    shard: Shard = field(default_factory=Shard)
    accept_changed: tuple[ComputationChange, ...] = ()
    npy: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("rows_per_part", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not 0 <= self.max_bad_share <= 1:
            raise InputError(f"max_bad_share is {self.max_bad_share}; expected a share from 0 to 1.")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run did; ``run.json`` holds it.

    Attributes:
        arguments: What decided the output, as in the journal.
        source: What the caller named.
        total: Of all parts in the folder that are this shard's own, also those of earlier runs.
        this_run: Of the parts that this process embedded.
        bad_kinds: Kind of problem → rows, of all parts.
        computations: What computed the parts, in the order of their beginning; of parts of a journal that was
            written before this was recorded, nothing is known.
        notes: What the reader of the vectors should know of how they were computed.
        seconds: Wall clock and CPU of this process, from the first row read to the last part written.
    """

    arguments: Mapping[str, Any]
    source: str
    engine: Mapping[str, Any]
    total: Counts
    this_run: Counts
    bad_kinds: Mapping[str, int]
    parts: int
    parts_done_before: int
    seconds: float
    cpu_seconds: float
    cores: int
    peak_memory_bytes: int
    finished: str
    computations: tuple[Computation, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def padding_share(self) -> float:
        """Padding among the tokens that this run computed."""
        computed = self.this_run.tokens + self.this_run.padding_tokens
        return self.this_run.padding_tokens / computed if computed else 0.0


@dataclass(frozen=True, slots=True)
class Watcher:
    """Whom a run tells what it does.

    Attributes:
        started: Once: the source, and rows in all where that is known, and those done before.
        observe: Batch by batch.
        part_done: Part by part, when its files are in place.
    """

    started: Callable[[Source, EngineChoice, int | None, int], None] = lambda source, engine, total, done: (
        None
    )
    observe: Observer = lambda n_rows, counts: None
    part_done: Callable[[PartRecord], None] = lambda record: None
