"""Pictures for a results page: looked up by the ids of hits, and small enough to be inlined."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from runtime.errors import InputError
from runtime.manifest import Modality
from runtime.preprocessing.image import require_size
from runtime.preprocessing.image_formats import open_image
from runtime.search.gallery import ID_COLUMNS, image_bytes, images_from_paths, open_table

__all__ = ["data_uri", "pictures_of_gallery", "pictures_of_ids", "small_picture"]

_THUMBNAIL_PX = 320
_INLINE_BYTES = 8_192
"""Size up to which images are inlined unchanged; larger ones become JPEG thumbnails."""

_INLINE_FORMATS = frozenset({"png", "jpeg", "gif", "webp"})


def pictures_of_ids(source: Path, ids: Collection[str], *, id_column: str | None = None) -> dict[str, bytes]:
    """Return encoded images by id; ids missing from the source are left out.

    Args:
        source: Folder of images, with ids as paths relative to it; Parquet file with a column ``image``; or
            any other source of images that ``babeltower embed`` accepts, such as a tar.
        ids: Ids to look up; of a folder or a Parquet file, only their images are read.
        id_column: Column with the ids in the Parquet file. Default: the first known column name that holds
            any of them, otherwise row numbers.

    Raises:
        InputError: the source does not exist, or has no images.
    """
    if source.is_dir() and (found := {one: path for one in ids if (path := _file_in(source, one))}):
        return {one: path.read_bytes() for one, path in found.items()}
    if source.suffix.lower() != ".parquet" or not source.is_file():
        return _pictures_of_corpus(source, ids, id_column)
    with open_table(source) as table:
        rows = _rows_of_ids(source, table, set(ids), id_column)
        return {rows[row]: image_bytes(source, row, cell) for row, cell in _cells(table, rows)}


def _pictures_of_corpus(source: Path, ids: Collection[str], id_column: str | None) -> dict[str, bytes]:
    from runtime.corpus.lookup import items_of_ids
    from runtime.corpus.rows import Columns
    from runtime.corpus.sources import open_source

    try:
        opened = open_source(str(source), columns=Columns(id=id_column))
    except InputError as error:
        try:  # samples of a tar may also have texts
            opened = open_source(str(source), columns=Columns(id=id_column, image="image"))
        except InputError:
            raise InputError(f"{source} is not a source of images: {error}") from None
    if opened.modality is not Modality.IMAGE:
        raise InputError(f"{source} is not a source of images: it has {opened.modality.value}s.")
    return items_of_ids(opened, ids)


def pictures_of_gallery(paths: Iterable[Path], names: Collection[str]) -> dict[str, bytes]:
    """Return encoded images by their names in ``images_from_paths``."""
    wanted = set(names)
    return {
        name: image.read_bytes() if isinstance(image, Path) else image
        for name, image in images_from_paths(paths)
        if name in wanted
    }


def data_uri(data: bytes) -> str:
    """Encode an image as a data URI; see ``small_picture``."""
    kind, picture = small_picture(data)
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def small_picture(data: bytes) -> tuple[str, bytes]:
    """Return an image's kind (``png``) and bytes: small ones unchanged, others as a JPEG of up to 320 pixels.

    Raises:
        ImageError: the bytes are not an image of a supported format.
        OSError: the image is truncated or damaged.
    """
    image = open_image(data, name="to show")
    require_size(image.size, "to show", None)
    kind = (image.format or "").lower()
    if len(data) > _INLINE_BYTES or kind not in _INLINE_FORMATS:
        return "jpeg", _thumbnail(image)
    return kind, data


def _thumbnail(image: Image.Image) -> bytes:
    image.draft("RGB", (2 * _THUMBNAIL_PX, 2 * _THUMBNAIL_PX))
    upright = ImageOps.exif_transpose(image).convert("RGBA")
    upright.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    on_white = Image.new("RGB", upright.size, "white")
    on_white.paste(upright, mask=upright)
    file = io.BytesIO()
    on_white.save(file, "JPEG", quality=82)
    return file.getvalue()


def _file_in(folder: Path, name: str) -> Path | None:
    """Return the file of an id, a path relative to the folder or the working directory, if in the folder."""
    for path in (folder / name, Path(name)):
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            return path
    return None


def _rows_of_ids(source: Path, table: Any, ids: set[str], id_column: str | None) -> dict[int, str]:
    names = table.schema_arrow.names
    if id_column is not None and id_column not in names:
        raise InputError(f"{source} has no column {id_column!r}; its columns are {names}.")
    columns = [id_column] if id_column else [name for name in ID_COLUMNS if name in names]
    for column in columns:
        rows = {row: value for row, value in _values(table, column) if value in ids}
        if rows:
            return rows
    n_rows = table.metadata.num_rows
    numbers = {int(one): one for one in ids if one.isdecimal()}
    return {} if id_column else {row: one for row, one in numbers.items() if row < n_rows}


def _values(table: Any, column: str) -> Iterator[tuple[int, str]]:
    row = 0
    for batch in table.iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            yield row, str(value)
            row += 1


def _cells(table: Any, rows: Collection[int]) -> Iterator[tuple[int, Any]]:
    """Yield the images of rows; row groups without any of them are not read."""
    first = 0
    for group in range(table.num_row_groups):
        end = first + table.metadata.row_group(group).num_rows
        wanted = [row for row in rows if first <= row < end]
        if wanted:
            column = table.read_row_group(group, columns=["image"]).column("image")
            yield from ((row, column[row - first].as_py()) for row in wanted)
        first = end
