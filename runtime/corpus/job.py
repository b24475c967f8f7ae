"""What one run has to do, and the threads of this process doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from runtime.corpus.computation import Computation
from runtime.corpus.engines import EngineChoice
from runtime.corpus.options import Options
from runtime.corpus.pipeline import EmbeddedPart, Observer, Workers, embedded_parts
from runtime.corpus.prepare import ImagePreparation, Preparation, TextPreparation
from runtime.corpus.rows import Rows, slices_from_rows
from runtime.corpus.sources import NumberedRows, Source, SourceFormat
from runtime.encoder import Encoder
from runtime.errors import CorpusError
from runtime.local import LocalEncoder
from runtime.machine import n_cores
from runtime.manifest import Modality

__all__ = ["Executor", "Job", "parts_in_process"]

_IMAGES_PER_SLICE = 16


@dataclass(slots=True)
class Job:
    """Parts of a source that are still to be embedded.

    Attributes:
        dim: Width of the vectors.
        pending: Whether a part is to be done.
        observe: Is told of each batch.
        computation: What makes the vectors; workers elsewhere must make them so too.
        n_rows: Rows of the whole source; whoever executes the job sets it at the end.
    """

    model: str
    encoder: Encoder
    source: Source
    options: Options
    choice: EngineChoice
    dim: int
    pending: Callable[[int], bool]
    observe: Observer
    computation: Computation = field(default_factory=dict)
    n_rows: int = 0

    @property
    def has_ids(self) -> bool:
        """Whether the source brings ids; row numbers stand in otherwise."""
        return self.source.columns.id is not None or self.source.format is SourceFormat.IMAGES

    def needs(self, start: int, stop: int) -> bool:
        """Whether any of these rows is in a pending part."""
        size = self.options.rows_per_part
        return any(map(self.pending, range(start // size, -(-stop // size))))

    def preparation(self) -> Preparation:
        """What comes before the tower."""
        return preparation_for(self.encoder, self.source.modality, self.options)

    def slices(self, rows: Iterable[Rows]) -> Iterator[tuple[int, Rows]]:
        """Pending parts' rows in slices: a whole part of texts, a few images."""
        for part, piece in slices_of_rows(rows, self.source.modality, self.options.rows_per_part):
            if self.pending(part):
                yield part, piece


Executor: TypeAlias = "Callable[[Job], Iterator[EmbeddedPart]]"


def parts_in_process(job: Job) -> Iterator[EmbeddedPart]:
    """Do a job on threads of this process; parts come in order."""
    rows = NumberedRows(job.source, job.needs)
    yield from embedded_parts(
        job.encoder,
        job.preparation(),
        job.slices(rows),
        dim=job.dim,
        rows_per_part=job.options.rows_per_part,
        has_ids=job.has_ids,
        workers=_workers(job),
        observe=job.observe,
    )
    job.n_rows = rows.n_rows


def slices_of_rows(
    rows: Iterable[Rows], modality: Modality, rows_per_part: int
) -> Iterator[tuple[int, Rows]]:
    """Slices with the number of their part: a whole part of texts, a few images."""
    size = rows_per_part if modality is Modality.TEXT else _IMAGES_PER_SLICE
    for piece in slices_from_rows(iter(rows), size=size, boundary=rows_per_part):
        yield piece.start // rows_per_part, piece


def preparation_for(encoder: Encoder, modality: Modality, options: Options) -> Preparation:
    """Tokenising or decoding, as the options say."""
    if not isinstance(encoder, LocalEncoder):
        from runtime.corpus.served import ServedImagePreparation, ServedTextPreparation

        if options.max_pixels is not None:
            raise CorpusError("With an address, max_pixels is the server's matter; leave it out.")
        if modality is Modality.TEXT:
            return ServedTextPreparation(encoder, language=options.language)
        return ServedImagePreparation(encoder)
    if modality is Modality.TEXT:
        return TextPreparation(encoder, language=options.language, max_batch_tokens=options.max_batch_tokens)
    return ImagePreparation(encoder.manifest.image, max_pixels=options.max_pixels)


def _workers(job: Job) -> Workers:
    """How many threads do what; the tokenizer takes all cores by itself."""
    towers = job.choice.instances or 1
    if job.source.modality is Modality.TEXT:
        return Workers(preparers=1, towers=towers, prepared_ahead=1)
    return Workers(preparers=n_cores(), towers=towers, prepared_ahead=2 * towers + 2)
