"""Text search in an index, a folder of vectors, or a gallery of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.encoder import Encoder
from runtime.errors import InputError
from runtime.indexes.conditions import Condition
from runtime.indexes.exact import Hit
from runtime.indexes.record import RECORD_FILE
from runtime.indexes.shards import VectorShards, holds_vectors
from runtime.indexes.vector_index import VectorIndex
from runtime.manifest import Modality
from runtime.search.gallery import gallery_from_images

__all__ = ["Answer", "Answers", "Query", "answers_from_sources"]


@dataclass(frozen=True, slots=True)
class Query:
    """Query text and its language, a picture, or both.

    Attributes:
        text: Query text; empty if the picture alone is searched by.
        language: Language of the text, if given.
        picture: Image file to search by; with a text, their vectors are added.
        picture_weight: Share of the picture's vector in the sum, from 0 to 1.
    """

    text: str
    language: str | None = None
    picture: Path | None = None
    picture_weight: float = 0.5

    @property
    def title(self) -> str:
        """Text and name of the picture."""
        names = [self.text, "" if self.picture is None else self.picture.name]
        return " + ".join(filter(None, names))


@dataclass(frozen=True, slots=True)
class Answer:
    """Hits of one query, best first."""

    query: Query
    hits: tuple[Hit, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to all queries, with a description of the searched items.

    Attributes:
        modality: Modality of the searched items.
        searched: Description of the searched items.
        source: Source of the searched items, as named when they were embedded; empty if unknown.
        is_gallery: True if images themselves were searched; ids are then the names of ``images_from_paths``.
        skipped: Error messages of skipped images.
    """

    answers: tuple[Answer, ...]
    modality: Modality
    searched: str
    source: str
    is_gallery: bool
    skipped: tuple[str, ...] = ()


def answers_from_sources(
    encoder: Encoder,
    sources: Sequence[Path],
    queries: Sequence[Query],
    *,
    k: int,
    dim: int | None = None,
    effort: int | None = None,
    threads: int | None = None,
    skip_bad: bool = False,
    where: Sequence[Condition] = (),
) -> Answers:
    """Search one index, one folder or file of vectors, or any number of images.

    Args:
        sources: Folder written by ``babeltower index`` or ``babeltower embed``; or image files, folders and
            Parquet files.
        dim: Vector width for images; stored vectors have a fixed width.
        effort: See ``VectorIndex.search``.
        threads: Threads of FAISS.
        skip_bad: Skip images that cannot be decoded, instead of failing.
        where: Conditions on kept columns, which only vectors have.

    Raises:
        InputError: the vectors are of another embedding space, checked before embedding; there are several
            sources and one holds vectors; an option does not apply to the source; or a query cannot be
            embedded.
    """
    source = sources[0]
    is_index = (source / RECORD_FILE).is_file()
    if any((path / RECORD_FILE).is_file() or holds_vectors(path) for path in sources):
        _require_alone(sources, dim=dim, skip_bad=skip_bad)
    elif effort is not None:
        raise InputError(f"{source} is not an index, so every image is compared. Leave effort out.")
    if is_index:
        return _from_index(encoder, source, queries, k=k, effort=effort, threads=threads, where=where)
    if holds_vectors(source):
        if effort is not None:
            raise InputError(f"{source} is not an index, so every vector is compared. Leave effort out.")
        return _from_vectors(encoder, source, queries, k=k, where=where)
    if where:
        raise InputError(f"{source} holds images, which have no columns. Search vectors by columns.")
    vectors = _embedded(encoder, queries, dim)
    gallery = gallery_from_images(encoder, sources, dim=dim, skip_bad=skip_bad)
    found = gallery.index.search(vectors, fingerprint=encoder.fingerprint, k=k)
    searched = f"{len(gallery.index.ids):,} images, exactly"
    return Answers(_answers(queries, found), Modality.IMAGE, searched, "", True, tuple(gallery.skipped))


def _from_index(
    encoder: Encoder,
    folder: Path,
    queries: Sequence[Query],
    *,
    k: int,
    effort: int | None,
    threads: int | None,
    where: Sequence[Condition],
) -> Answers:
    with VectorIndex.open(folder, threads=threads) as index:
        record = index.record
        index.space.require(encoder.fingerprint, holder=str(folder))
        vectors = _embedded(encoder, queries, record.dim)
        found = index.search(vectors, fingerprint=encoder.fingerprint, k=k, effort=effort, where=where)
        searched = f"{record.kind} index of {record.n_rows:,} {record.modality}s"
        if record.point and effort in (None, record.effort):
            searched += f" (recall@{record.recall.k} {record.point.recall:.3f} of exact search)"
        return Answers(_answers(queries, found), Modality(record.modality), searched, record.source, False)


def _from_vectors(
    encoder: Encoder, location: Path, queries: Sequence[Query], *, k: int, where: Sequence[Condition]
) -> Answers:
    shards = VectorShards.open(location)
    shards.space.require(encoder.fingerprint, holder=str(location))
    vectors = _embedded(encoder, queries, shards.space.dim)
    found = shards.search(vectors, fingerprint=encoder.fingerprint, k=k, where=where)
    searched = f"{len(shards):,} embedded {shards.modality}s, exactly"
    return Answers(_answers(queries, found), Modality(shards.modality), searched, shards.source, False)


def _embedded(encoder: Encoder, queries: Sequence[Query], dim: int | None) -> NDArray[np.float32]:
    return np.concatenate([_query_vector(encoder, one, dim) for one in queries])


def _query_vector(encoder: Encoder, query: Query, dim: int | None) -> NDArray[np.float32]:
    """Embed a query: float32 (1, dim); of text and picture, the weighted sum of both unit vectors."""
    if query.picture is None:
        text: NDArray[np.float32] = encoder.embed_texts([query.text], query.language, dim=dim)
        return text
    picture: NDArray[np.float32] = encoder.embed_images([query.picture], dim=dim)
    if not query.text:
        return picture
    text = encoder.embed_texts([query.text], query.language, dim=dim)
    return (1 - query.picture_weight) * text + query.picture_weight * picture


def _answers(queries: Sequence[Query], found: Sequence[Sequence[Hit]]) -> tuple[Answer, ...]:
    return tuple(Answer(query, tuple(hits)) for query, hits in zip(queries, found, strict=True))


def _require_alone(sources: Sequence[Path], *, dim: int | None, skip_bad: bool) -> None:
    missing = [str(path) for path in sources if not path.exists()]
    if missing:
        raise InputError(
            f"{missing[0]} does not exist. Only the last argument is the query text; pass more texts as "
            "--query LANGUAGE=TEXT."
        )
    if len(sources) > 1:
        raise InputError(
            f"One of {', '.join(map(str, sources))} holds vectors, which cannot be searched together with "
            "other sources. Pass it without the others."
        )
    if dim is not None:
        raise InputError(f"{sources[0]} holds vectors, whose width is fixed. Leave --dim out.")
    if skip_bad:
        raise InputError(f"{sources[0]} holds vectors, which are never skipped. Leave --skip-bad out.")
