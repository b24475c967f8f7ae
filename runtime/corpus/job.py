"""Job of one run, and its execution on threads of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from runtime.corpus.computation import Computation
from runtime.corpus.engines import EngineChoice
from runtime.corpus.faults import Patience
from runtime.corpus.options import Options
from runtime.corpus.pictures import Picture, PictureReader
from runtime.corpus.pipeline import OPEN_PARTS, EmbeddedPart, Observer, Workers, embedded_parts
from runtime.corpus.prepare import ImagePreparation, TextPreparation
from runtime.corpus.rows import Rows, slices_from_rows
from runtime.corpus.slices import Preparation, digest_of_part, digest_of_rows
from runtime.corpus.sources import Locations, NumberedRows, Source, SourceFormat, open_source
from runtime.encoder import Encoder
from runtime.errors import ChangedInputError, CorpusError
from runtime.local import LocalEncoder
from runtime.machine import n_cores
from runtime.manifest import Modality
from runtime.preprocessing.buckets import GPU_BATCH_IMAGES

__all__ = [
    "Executor",
    "Job",
    "Reread",
    "finished_parts_read_again",
    "images_per_slice",
    "more_or_fewer_rows",
    "parts_in_process",
    "require_content",
    "runs_on_gpu",
    "source_of_run",
]

_IMAGES_PER_SLICE = 16


def source_of_run(
    source: str | os.PathLike[str] | Locations | Iterable[Any], options: Options, out: str
) -> Source:
    """Open the source of a run as its options say, without the files of its output.

    Args:
        out: Path or URL of the output folder.

    Raises:
        InputError: see ``open_source``.
    """
    return open_source(
        source,
        columns=options.columns,
        format=options.format,
        reading=options.reading,
        name=options.name,
        exclude=None if "://" in out else out,
    )


@dataclass(slots=True)
class Job:
    """Pending parts of a source, with everything needed to embed them.

    Attributes:
        dim: Width of the vectors.
        pending: Predicate: part number → may be claimed, as far as is known.
        claim: Predicate: part number → this run embeds it, and no other worker does.
        observe: Callback after each batch.
        computation: Identity of the computation; remote workers must match it.
        known_content: Finished part → hash of what was read for it; compared where it is read again anyway.
        known_end: Rows of the whole source when it was last read to its end; further ones are not embedded.
        n_rows: Rows of the whole source; set by the executor at the end.
    """

    model: str
    encoder: Encoder
    source: Source
    options: Options
    choice: EngineChoice
    dim: int
    pending: Callable[[int], bool]
    claim: Callable[[int], bool]
    observe: Observer
    computation: Computation = field(default_factory=dict)
    known_content: Mapping[int, str] = field(default_factory=dict)
    known_end: int | None = None
    n_rows: int = 0

    @property
    def has_ids(self) -> bool:
        """True if the source has ids; otherwise row numbers are used."""
        return self.source.columns.id is not None or self.source.format is SourceFormat.IMAGES

    def needs(self, start: int, stop: int) -> bool:
        """Check whether any row of a range is in a pending part."""
        size = self.options.rows_per_part
        parts = range(start // size, -(-stop // size))
        return any(map(self.pending, parts)) or (
            self._rereads and any(part in self.known_content for part in parts)
        )

    @property
    def _rereads(self) -> bool:
        """True if rows of finished parts are read in any case: texts of files that must be read through."""
        return self.source.modality is Modality.TEXT and self.source.n_rows(0) is None

    def preparation(self) -> Preparation:
        """Return the preparation of this job's rows."""
        return preparation_for(
            self.encoder, self.source.modality, self.options, patience=self.source.patience
        )

    def slices(self, rows: Iterable[Rows]) -> Iterator[tuple[int, Rows]]:
        """Claim parts, and yield their rows in slices: a whole part of texts, or a few images."""
        n_images = images_per_slice(self.encoder)
        for part, piece in slices_of_rows(
            rows, self.source.modality, self.options.rows_per_part, n_images=n_images
        ):
            if self.known_end is not None and piece.stop > self.known_end:
                raise more_or_fewer_rows(self.known_end)
            if self.claim(part):
                yield part, piece
            elif self._rereads and (known := self.known_content.get(part)):
                require_content(part, known, digest_of_part([digest_of_rows(piece)]))


def more_or_fewer_rows(known_end: int) -> ChangedInputError:
    """Return the error of a source that has other rows than when it was read to its end."""
    return ChangedInputError(
        f"The source gives more or fewer rows than the {known_end:,} that it had. Restore it, choose another "
        "output folder, or pass --recheck-input to take up the changed source."
    )


@dataclass(frozen=True, slots=True)
class Reread:
    """Result of reading the finished parts again.

    Attributes:
        unchanged: Part whose rows are those that were embedded → image files behind its path column, as they
            are now.
        n_rows: Rows of the whole source.
    """

    unchanged: Mapping[int, tuple[Picture, ...]]
    n_rows: int


def require_content(part: int, known: str, found: str) -> None:
    """Check that a finished part's rows are what was embedded.

    Raises:
        ChangedInputError: the source gives other rows.
    """
    if found != known:
        raise ChangedInputError(
            f"The source gives other rows for part {part} than those that were embedded. Restore it, choose "
            "another output folder, or pass --recheck-input to embed the parts again whose rows changed."
        )


def finished_parts_read_again(job: Job, known: Mapping[int, str]) -> Reread:
    """Read finished parts again, without embedding them, and compare them with what was embedded.

    Args:
        known: Finished part → hash of what was read for it.
    """
    size = job.options.rows_per_part
    rows = NumberedRows(
        job.source, lambda start, stop: any(part in known for part in range(start // size, -(-stop // size)))
    )
    preparation = job.preparation()
    slices = slices_of_rows(
        preparation.shortened(iter(rows)), job.source.modality, size, n_images=images_per_slice(job.encoder)
    )
    found: dict[int, list[bytes]] = {}
    pictures: dict[int, list[Picture]] = {}
    for piece in preparation.deduplicated((part, piece) for part, piece in slices if part in known):
        is_image = job.source.modality is Modality.IMAGE
        digest = digest_of_rows(piece.rows, piece.content if is_image else None)
        found.setdefault(piece.part, []).append(digest)
        pictures.setdefault(piece.part, []).extend(piece.pictures)
    unchanged = {
        part: tuple(pictures.get(part, ()))
        for part, content in known.items()
        if digest_of_part(found.get(part, [])) == content
    }
    return Reread(unchanged, rows.n_rows)


Executor: TypeAlias = "Callable[[Job], Iterator[EmbeddedPart]]"


def parts_in_process(job: Job) -> Iterator[EmbeddedPart]:
    """Run a job on threads of this process, yielding parts in order."""
    rows = NumberedRows(job.source, job.needs)
    preparation = job.preparation()
    job.source.patience.renew()
    yield from embedded_parts(
        job.encoder,
        preparation,
        job.slices(preparation.shortened(iter(rows))),
        dim=job.dim,
        rows_per_part=job.options.rows_per_part,
        has_ids=job.has_ids,
        workers=_workers(job),
        observe=job.observe,
        on_stop=job.source.patience.end,
        most_open=_most_open(job),
    )
    job.n_rows = rows.n_rows


def images_per_slice(encoder: Encoder) -> int:
    """Return the number of images that are decoded, and run, at once."""
    return GPU_BATCH_IMAGES if runs_on_gpu(encoder) else _IMAGES_PER_SLICE


def runs_on_gpu(encoder: Encoder) -> bool:
    """Return whether an encoder runs its towers on a GPU in this process."""
    return isinstance(encoder, LocalEncoder) and encoder.on_gpu


def slices_of_rows(
    rows: Iterable[Rows], modality: Modality, rows_per_part: int, *, n_images: int = _IMAGES_PER_SLICE
) -> Iterator[tuple[int, Rows]]:
    """Yield slices with their part number: a whole part of texts, or ``n_images`` images."""
    size = rows_per_part if modality is Modality.TEXT else n_images
    for piece in slices_from_rows(iter(rows), size=size, boundary=rows_per_part):
        yield piece.start // rows_per_part, piece


def preparation_for(
    encoder: Encoder, modality: Modality, options: Options, *, patience: Patience | None = None
) -> Preparation:
    """Return the preparation for a modality: tokenizing, decoding, or sending to a server."""
    reading = options.reading
    reader = PictureReader(patience or Patience(reading.patience_s), skip_bad_files=reading.skip_bad_files)
    if not isinstance(encoder, LocalEncoder):
        from runtime.corpus.remote import RemoteImagePreparation, RemoteTextPreparation

        if options.max_pixels is not None:
            raise CorpusError("max_pixels is set on the server; leave it out with an address.")
        if modality is Modality.TEXT:
            return RemoteTextPreparation(encoder, language=options.language)
        return RemoteImagePreparation(encoder, reader)
    if modality is Modality.TEXT:
        budget = options.batch_tokens(on_gpu=encoder.on_gpu)
        return TextPreparation(encoder, language=options.language, max_batch_tokens=budget)
    return ImagePreparation(encoder.manifest.image, max_pixels=options.max_pixels, reader=reader)


def _most_open(job: Job) -> int:
    """Return how many parts may be unfinished at once: small parts of images must keep all threads busy."""
    if job.source.modality is Modality.TEXT:
        return OPEN_PARTS
    workers = _workers(job)
    in_flight = 2 + workers.preparers + workers.prepared_ahead + workers.towers
    per_part = max(1, job.options.rows_per_part // images_per_slice(job.encoder))
    return OPEN_PARTS + in_flight // per_part


def _workers(job: Job) -> Workers:
    """Return the thread counts; the tokenizer itself uses all cores."""
    # on a GPU, a second thread copies its batch in while the first one's is computed
    towers = max(job.choice.instances or 1, 2 if runs_on_gpu(job.encoder) else 1)
    if job.source.modality is Modality.TEXT:
        return Workers(preparers=1, towers=towers, prepared_ahead=1)
    return Workers(preparers=n_cores(), towers=towers, prepared_ahead=2 * towers + 2)
