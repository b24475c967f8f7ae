"""Gallery of the page: vectors, names and pictures, of the sample drawings or of a folder of vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from export.retrieval.sample_set import sample_retrieval_set
from export.towers import Float
from runtime.backends.backend import Backend
from runtime.cosines import unit_rows
from runtime.embeddings import Encoding
from runtime.errors import BabeltowerError, ExportError
from runtime.indexes.shards import VectorShards, holds_vectors
from runtime.manifest import ImagePreprocessing, Modality
from runtime.preprocessing.batching import windows
from runtime.preprocessing.image import ImageSource, pixels_from_source
from runtime.search.pictures import pictures_of_ids, small_picture

__all__ = [
    "MOST_ITEMS",
    "GallerySource",
    "WebGallery",
    "gallery_of_folder",
    "sample_gallery",
    "vectors_of_images",
    "write_pictures",
]

MOST_ITEMS = 100_000
"""Largest gallery: a tab keeps all its vectors, and compares each with every query."""

_BATCH_IMAGES = 16
_PICTURES_AT_ONCE = 500
_NAMES = "eng_Latn"


@dataclass(frozen=True, slots=True)
class GallerySource:
    """Folder that ``babeltower embed`` wrote, and the source of its pictures.

    Attributes:
        folder: Folder of vectors, or one of its files.
        pictures: Folder, Parquet file or tars of the pictures; the recorded source of the vectors if None.
        id_column: Column of ``pictures`` that holds the ids.
    """

    folder: Path
    pictures: Path | None = None
    id_column: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class WebGallery:
    """Items to search.

    Attributes:
        kind: Plural noun for the items.
        names: Name of each item, shown beside it.
        vectors: Unit float32 (items, dim).
        pictures: Batches of encoded pictures by the item's position, read when they are written.
        credit: Attribution, shown on the page.
        notes: Sentences for the user who exports.
    """

    title: str
    kind: str
    names: Sequence[str]
    vectors: Float
    pictures: Iterator[Mapping[int, bytes]] = field(repr=False)
    credit: str = ""
    notes: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.vectors.shape[1])


def sample_gallery(image_tower: Backend, preprocessing: ImagePreprocessing) -> WebGallery:
    """Embed the sample drawings; names are English.

    Raises:
        DatasetError: the samples are missing.
        EngineError: the tower fails.
    """
    drawings = sample_retrieval_set()
    (captions,) = drawings.select([_NAMES]).captions
    names = {image: text for text, image in zip(captions.texts, captions.image_of, strict=True)}
    files = [image.read() for image in drawings.images]
    vectors = vectors_of_images(image_tower, preprocessing, files, batch_size=_BATCH_IMAGES)
    return WebGallery(
        title=f"{len(files):,} emoji drawings",
        kind="drawings",
        names=[names.get(i, image.key) for i, image in enumerate(drawings.images)],
        vectors=np.concatenate(list(vectors)),
        pictures=iter([dict(enumerate(files))]),
        credit=drawings.credit,
    )


def vectors_of_images(
    tower: Backend, preprocessing: ImagePreprocessing, images: Iterable[ImageSource], *, batch_size: int
) -> Iterator[Float]:
    """Embed images at full width; yield float32 (batch, dim).

    Raises:
        ImageError: an image cannot be decoded.
        EngineError: the tower fails.
    """
    for batch in windows(images, batch_size):
        pixels = np.stack([pixels_from_source(image, preprocessing) for image in batch])
        yield tower.run({"pixels": pixels}, ["vector"])[0]


def gallery_of_folder(source: GallerySource, *, fingerprint: str, dims: Sequence[int]) -> WebGallery:
    """Read a folder of vectors, and find the pictures of its rows.

    Args:
        fingerprint: Embedding space of the text tower.
        dims: Widths of the text tower's outputs.

    Raises:
        InputError: the folder is damaged, of another embedding space, or its pictures cannot be found.
        ExportError: the folder holds no vectors, too many, or such as the page cannot compare.
    """
    if not holds_vectors(source.folder):
        raise ExportError(
            f"{source.folder} holds no vectors. Write them with `babeltower embed REPOSITORY/NAME SOURCE "
            f"--out {source.folder}`, or leave --gallery out for the sample drawings."
        )
    shards = VectorShards.open(source.folder)
    shards.space.require(fingerprint, holder=str(source.folder))
    _require_comparable(source.folder, shards, dims)
    blocks = [(block.ids.to_pylist(), block.vectors) for block in shards.blocks()]
    ids = [str(one) for block, _ in blocks for one in block]
    vectors = unit_rows(np.concatenate([shards.space.decoded(rows) for _, rows in blocks]))
    place, notes = _place_of_pictures(source, shards)
    return WebGallery(
        title=f"{len(ids):,} {shards.modality}s",
        kind=f"{shards.modality}s",
        names=ids,
        vectors=vectors,
        pictures=iter(()) if place is None else _pictures(place, ids, source.id_column),
        notes=notes,
    )


def _require_comparable(folder: Path, shards: VectorShards, dims: Sequence[int]) -> None:
    if shards.space.encoding is Encoding.BINARY:
        raise ExportError(
            f"{folder} holds one bit a component, which the page does not compare. Embed the source "
            "as float16."
        )
    if shards.space.dim not in dims:
        raise ExportError(
            f"{folder} holds {shards.space.dim}-wide vectors; the text tower gives "
            f"{', '.join(map(str, dims))}."
        )
    if not 0 < len(shards) <= MOST_ITEMS:
        raise ExportError(
            f"{folder} holds {len(shards):,} vectors; a page searches 1 to {MOST_ITEMS:,}. Search more with "
            "`babeltower search`, or serve them."
        )


def _place_of_pictures(source: GallerySource, shards: VectorShards) -> tuple[Path | None, tuple[str, ...]]:
    if Modality(shards.modality) is not Modality.IMAGE:
        if source.pictures is not None:
            raise ExportError(f"{source.folder} holds texts, which have no pictures. Leave --pictures out.")
        return None, ()
    if source.pictures is not None:
        return source.pictures, ()
    recorded = Path(shards.source) if shards.source else None
    if recorded is not None and recorded.exists():
        return recorded, (f"Pictures are from {recorded}, the recorded source of the vectors.",)
    return None, (
        f"The gallery has no pictures: the source of its vectors ({shards.source or 'not recorded'}) is not "
        "here. Pass --pictures SOURCE.",
    )


def _pictures(place: Path, ids: Sequence[str], id_column: str | None) -> Iterator[Mapping[int, bytes]]:
    """Yield pictures by position.

    Raises:
        ExportError: the place has none of them.
    """
    n_found, numbered = 0, iter(enumerate(ids))
    while batch := list(islice(numbered, _PICTURES_AT_ONCE)):
        found = pictures_of_ids(place, {one for _, one in batch}, id_column=id_column)
        n_found += len(found)
        yield {number: found[one] for number, one in batch if one in found}
    if n_found == 0:
        raise ExportError(
            f"{place} has none of the {len(ids):,} pictures of the gallery, such as {ids[0]!r}. Pass the "
            "source of the vectors as --pictures, and --id-column if its ids have a column of their own."
        )


def write_pictures(gallery: WebGallery, folder: Path) -> tuple[list[str | None], tuple[str, ...]]:
    """Write small pictures to ``folder/gallery/pictures``.

    Returns:
        Path of each item's picture in the page's folder, or None; and notes on missing ones.
    """
    paths: list[str | None] = [None] * len(gallery.names)
    bad: dict[int, str] = {}
    (folder / "gallery" / "pictures").mkdir(parents=True)
    for batch in gallery.pictures:
        for number, data in batch.items():
            try:
                kind, small = small_picture(data)
            except (BabeltowerError, OSError) as error:
                bad[number] = str(error)
                continue
            paths[number] = f"gallery/pictures/{number:06d}.{kind}"
            (folder / str(paths[number])).write_bytes(small)
    return paths, _notes_on_pictures(gallery, paths, bad)


def _notes_on_pictures(
    gallery: WebGallery, paths: Sequence[str | None], bad: Mapping[int, str]
) -> tuple[str, ...]:
    missing = paths.count(None)
    if missing == 0 or missing == len(paths):
        return ()
    first: Any = next(iter(bad), paths.index(None))
    why = f"{gallery.names[first]!r}: {bad[first]}" if bad else f"such as {gallery.names[first]!r}"
    return (f"{missing:,} of {len(paths):,} items have no picture ({why}).",)
