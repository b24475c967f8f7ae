"""Texts and images as request tensors, so that the server sees the same inputs as in process."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import ImageError
from runtime.manifest import Modality
from runtime.preprocessing.batching import windows
from runtime.preprocessing.cleaning import whole_characters
from runtime.preprocessing.image import ImageSource, Snapshot, decode, snapshot_from_source
from runtime.preprocessing.image_formats import open_image
from runtime.preprocessing.served_limits import SERVED_BYTES
from runtime.preprocessing.text import Text

__all__ = ["RequestRows", "bytes_from_image", "concatenated", "rows_from_images", "rows_from_texts"]

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
"""Modes that PNG stores unchanged; other modes are sent as TIFF."""


@dataclass(frozen=True, slots=True)
class RequestRows:
    """Rows of one request.

    Attributes:
        places: Position of each row in the caller's input.
        columns: Inputs by name, one value per row.
    """

    modality: Modality
    places: tuple[int, ...]
    columns: dict[str, tuple[bytes, ...]]

    def __len__(self) -> int:
        return len(self.places)

    def tensors(self, *, dim: int | None) -> dict[str, NDArray[Any]]:
        """Return BYTES (rows, 1) for each column, and INT32 (rows, 1) ``dim`` if given."""
        tensors: dict[str, NDArray[Any]] = {}
        for name, values in self.columns.items():
            tensors[name] = np.empty((len(values), 1), dtype=np.object_)
            tensors[name][:, 0] = values
        if dim is not None:
            tensors["dim"] = np.full((len(self), 1), dim, dtype=np.int32)
        return tensors

    def alone(self) -> Iterator[RequestRows]:
        """Yield each row as its own request."""
        for i, place in enumerate(self.places):
            yield RequestRows(self.modality, (place,), {name: (v[i],) for name, v in self.columns.items()})


def rows_from_texts(
    texts: Iterable[Text],
    *,
    per_request: int,
    default_language: str | None,
    most_characters: int | None = None,
) -> Iterator[RequestRows]:
    """Split texts lazily into requests.

    Args:
        most_characters: Characters above which a request has fewer texts.

    Raises:
        InputError: a text holds a lone surrogate.
    """
    for window in _bounded_windows(texts, per_request, most_characters):
        columns = {"text": tuple(whole_characters(t.text, f"Text {t.index}").encode() for t in window)}
        codes = [default_language if text.language is None else text.language for text in window]
        given = tuple(whole_characters(code, "A language").encode() for code in codes if code is not None)
        if len(given) == len(window):
            columns["language"] = given
        yield RequestRows(Modality.TEXT, tuple(text.index for text in window), columns)


def _bounded_windows(
    texts: Iterable[Text], per_request: int, most_characters: int | None
) -> Iterator[list[Text]]:
    for window in windows(texts, per_request):
        if most_characters is None or sum(len(text.text) for text in window) <= most_characters:
            yield window
            continue
        part: list[Text] = []
        n_characters = 0
        for text in window:
            if part and n_characters + len(text.text) > most_characters:
                yield part
                part, n_characters = [], 0
            part.append(text)
            n_characters += len(text.text)
        yield part


def rows_from_images(images: Iterable[ImageSource], *, per_request: int) -> Iterator[RequestRows]:
    """Split images lazily into requests; each image is copied before the next is requested.

    A request has no more bytes than a server takes by default, unless one image alone has more.

    Raises:
        ImageError: a file is missing, or an image cannot be sent losslessly.
    """
    files = ((i, bytes_from_image(image, name=f"{i}")) for i, image in enumerate(images))
    part: list[tuple[int, bytes]] = []
    n_bytes = 0
    for i, file in files:
        if part and (len(part) == per_request or n_bytes + len(file) > SERVED_BYTES):
            yield _rows_of_files(part)
            part, n_bytes = [], 0
        part.append((i, file))
        n_bytes += len(file)
    if part:
        yield _rows_of_files(part)


def _rows_of_files(files: Sequence[tuple[int, bytes]]) -> RequestRows:
    places, contents = tuple(i for i, _ in files), tuple(file for _, file in files)
    return RequestRows(Modality.IMAGE, places, {"image": contents})


def bytes_from_image(source: ImageSource | Snapshot, *, name: str) -> bytes:
    """Return the bytes of an image file: a caller's bytes unchanged, decoded pixels losslessly.

    Raises:
        ImageError: the image is missing, empty, invalid, or of a mode that no file format keeps.
    """
    taken = snapshot_from_source(source, name=name)
    content = taken.content
    if isinstance(content, str):
        path = Path(content)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ImageError(f"Image {name}, {path}, does not exist.") from None
        except OSError as error:
            raise ImageError(f"Image {name} cannot be read: {error}.") from error
    if isinstance(content, bytes):
        if not content:
            raise ImageError(f"Image {name} cannot be decoded: it is empty (0 bytes).")
        return content
    image = decode(taken)
    file = io.BytesIO()
    try:
        if image.mode in _PNG_MODES:
            image.save(file, "PNG", compress_level=1)
        else:
            image.save(file, "TIFF")
            _require_same(image, file.getvalue())
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(
            f"Image {name} has mode {image.mode}, which cannot be sent losslessly ({error}). Convert it "
            "to RGB first, or pass the bytes of its file."
        ) from error
    return file.getvalue()


def _require_same(image: Image.Image, file: bytes) -> None:
    read = open_image(file, name="to be sent")
    if read.mode != image.mode or read.tobytes() != image.tobytes():
        raise ValueError(f"its file has mode {read.mode}")


def concatenated(parts: Sequence[NDArray[np.float32]], dim: int) -> NDArray[np.float32]:
    """Concatenate parts of one width; (0, dim) if there are none."""
    return np.concatenate([np.empty((0, dim), np.float32), *parts])
