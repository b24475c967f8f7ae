"""Options, callbacks and final record of a corpus run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.corpus.computation import Computation, ComputationChange
from runtime.corpus.engines import EngineChoice
from runtime.corpus.folder.leases import LEASE_S
from runtime.corpus.journal import PartRecord, Shard
from runtime.corpus.pipeline import Observer
from runtime.corpus.rows import Columns
from runtime.corpus.slices import Counts
from runtime.corpus.sources import BadFile, Reading, Source, SourceFormat
from runtime.counts import require_count
from runtime.embeddings import Encoding
from runtime.errors import InputError
from runtime.preprocessing.buckets import GPU_BATCH_TOKENS
from runtime.remote.options import Connection

__all__ = ["Options", "RunRecord", "Watcher"]

ROWS_PER_PART = 32_768
MAX_BATCH_TOKENS = 1_024
"""Texts × padded length of one batch on a CPU; see ``runtime/preprocessing/buckets.py`` for a GPU."""
MAX_BAD_SHARE = 0.5

_SHORTEST_LEASE_S, _LONGEST_LEASE_S = 1.0, 86_400.0

_MOST = 100_000_000
"""Largest number of rows or tokens that an option may name."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a corpus run.

    Attributes:
        columns: Columns of ids, texts, images and languages; default: their usual names.
        format: Storage format of the source; default: inferred from suffixes.
        reading: Delimiter, encoding and other options of reading the source.
        name: Name of an iterable or of standard input, by which a run into the same folder is resumed.
        language: Language code of texts without one.
        dim: Width of the vectors; default: the full width.
        encoding: Storage format of the vectors.
        engine: Engine, precision, instances and threads; unset fields are measured.
        rows_per_part: Source rows per output file, and the most that an interruption loses.
        max_batch_tokens: Texts × padded length of one batch, in tokens; default: 1,024, and 16,384 on a GPU.
        max_pixels: Width × height above which an image is bad; default: Pillow's limit.
        max_bad_share: Share of bad rows above which the run stops.
        shard: Shard of the parts that this run embeds.
        accept_changed: Parts of the computation (engine version, processor, libraries) that may differ from
            the existing parts. The new vectors then differ slightly; the journal records the change.
        retry_bad: Kinds of bad rows, such as ``missing-file``: finished parts with any are embedded again.
        recheck_input: Read the finished parts of a source again whose files were changed, and embed those
            whose rows differ from what was read before.
        append: Go on with a folder to whose source files were added, after all others.
        keep: Columns of the source that are written beside the vectors; of Parquet, Arrow and datasets.
        npy: Also write the vectors as NumPy arrays, in ``_npy``.
        lease_s: Seconds without a sign of life after which another worker takes over a worker's parts.
        cache: As in ``Encoder.open``.
        connection: Connection options of a server; not part of the output's arguments.
    """

    columns: Columns = field(default_factory=Columns)
    format: SourceFormat | None = None
    reading: Reading = field(default_factory=Reading)
    name: str | None = None
    language: str | None = None
    dim: int | None = None
    encoding: Encoding = Encoding.FLOAT32
    engine: EngineChoice = field(default_factory=EngineChoice)
    rows_per_part: int = ROWS_PER_PART
    max_batch_tokens: int | None = None
    max_pixels: int | None = None
    max_bad_share: float = MAX_BAD_SHARE
    shard: Shard = field(default_factory=Shard)
    accept_changed: tuple[ComputationChange, ...] = ()
    retry_bad: tuple[str, ...] = ()
    recheck_input: bool = False
    append: bool = False
    keep: tuple[str, ...] = ()
    npy: bool = False
    lease_s: float = LEASE_S
    cache: Path | None = None
    connection: Connection | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("rows_per_part", "max_batch_tokens", "max_pixels"):
            value = getattr(self, name)
            if value is not None:
                require_count(value, name)
                if value > _MOST:
                    raise InputError(f"{name} is {value}; expected at most {_MOST:,}.")
        if not _SHORTEST_LEASE_S <= self.lease_s <= _LONGEST_LEASE_S:
            raise InputError(
                f"lease_s is {self.lease_s}; expected {_SHORTEST_LEASE_S} to {_LONGEST_LEASE_S} seconds."
            )
        if not 0 <= self.max_bad_share <= 1:
            raise InputError(f"max_bad_share is {self.max_bad_share}; expected a share from 0 to 1.")

    def batch_tokens(self, *, on_gpu: bool) -> int:
        """Return ``max_batch_tokens``, or the device's own."""
        return self.max_batch_tokens or (GPU_BATCH_TOKENS if on_gpu else MAX_BATCH_TOKENS)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Summary of a run, stored as ``_run.json``.

    Attributes:
        arguments: Arguments that determine the output, as in the journal.
        source: Source as named by the caller.
        total: Counts over all parts of this shard in the folder, also those of other workers and runs.
        this_run: Counts over the parts embedded by this process.
        bad_kinds: Kind of problem → number of rows, over all parts.
        computations: Computations of the parts, in the order in which they were first recorded.
        notes: Remarks for users of the vectors on how they were computed.
        bad_files: Files of the source that were set aside, by this or an earlier run.
        seconds: Wall-clock time from the first row read to the last part written; ``cpu_seconds`` is the
            CPU time of this process.
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
    bad_files: tuple[BadFile, ...] = ()

    @property
    def padding_share(self) -> float:
        """Share of padding in the tokens computed by this run."""
        computed = self.this_run.tokens + self.this_run.padding_tokens
        return self.this_run.padding_tokens / computed if computed else 0.0


@dataclass(frozen=True, slots=True)
class Watcher:
    """Callbacks that report a run's progress.

    Attributes:
        started: Called once with the source, engine choice, total rows (if known) and rows already done.
        observe: Called after each batch.
        part_done: Called for each part once its files are in place.
    """

    started: Callable[[Source, EngineChoice, int | None, int], None] = lambda source, engine, total, done: (
        None
    )
    observe: Observer = lambda n_rows, counts: None
    part_done: Callable[[PartRecord], None] = lambda record: None
