"""A caller's images on the way to other threads: lazy, shared, animated, reused, closed."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageSequence

from runtime.errors import ImageError
from runtime.manifest import ImagePreprocessing
from runtime.preprocessing.image import decode, pixels_from_image, snapshot_from_source
from runtime.remote.payloads import bytes_from_image, rows_from_images
from runtime.towers import ImageTower

SIDE = 24
DIM = 3 * SIDE * SIDE
PREPROCESSING = ImagePreprocessing(
    SIDE, SIDE, "shortest", "bicubic", "resize-convert", "round", (0, 0, 0), (1, 1, 1)
)


class Pixels:
    """A tower whose vectors are the pixels themselves."""

    def run(self, inputs: Any, outputs: Any) -> list[Any]:
        return [inputs["pixels"].reshape(len(inputs["pixels"]), -1).astype(np.float32)]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def tower() -> Iterator[ImageTower]:
    opened = ImageTower(PREPROCESSING, Pixels(), ThreadPoolExecutor(8), None)
    yield opened
    opened.close()


def vectors(tower: ImageTower, images: Any) -> Any:
    return tower.vectors_from_images(enumerate(images), output="vector", dim=DIM)[0]


def vector(image: Any) -> Any:
    """Pixels of an image by itself, by Pillow alone."""
    return pixels_from_image(image, PREPROCESSING).reshape(-1).astype(np.float32)


def scene(seed: int = 0, size: tuple[int, int] = (320, 240)) -> Image.Image:
    smooth = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC)


def frames(n: int, size: tuple[int, int] = (120, 90)) -> list[Image.Image]:
    return [scene(seed, size) for seed in range(n)]


def file_of(folder: Path, kind: str, n_frames: int = 1) -> Path:
    path = folder / f"{n_frames}.{kind}"
    first, *others = frames(n_frames) if n_frames > 1 else [scene()]
    options: dict[str, Any] = {"save_all": True, "append_images": others} if others else {}
    first.save(path, kind.upper().replace("APNG", "PNG"), **options)
    return path


STILL = ["png", "jpeg", "webp", "gif", "bmp", "tiff", "avif", "ppm"]
ANIMATED = ["gif", "webp", "apng", "tiff", "avif"]


@pytest.mark.parametrize("kind", STILL)
def test_one_lazy_image_several_times(tower: ImageTower, tmp_path: Path, kind: str) -> None:
    path = file_of(tmp_path, kind)
    expected = vector(Image.open(path))
    for _ in range(25):
        image = Image.open(path)
        found = vectors(tower, [image] * 8)
        assert (found == expected).all()


@pytest.mark.parametrize("kind", STILL)
def test_one_lazy_image_in_calls_of_several_threads(tower: ImageTower, tmp_path: Path, kind: str) -> None:
    path = file_of(tmp_path, kind)
    expected = vector(Image.open(path))
    with ThreadPoolExecutor(4) as callers:
        for _ in range(25):
            image = Image.open(path)
            start = threading.Barrier(4)

            def call(image: Image.Image = image, start: threading.Barrier = start) -> Any:
                start.wait()
                return vectors(tower, [image, image])

            for found in [caller.result() for caller in [callers.submit(call) for _ in range(4)]]:
                assert (found == expected).all()


@pytest.mark.parametrize("kind", STILL)
def test_lazy_images_over_one_file(tower: ImageTower, tmp_path: Path, kind: str) -> None:
    path = file_of(tmp_path, kind)
    expected = vector(Image.open(path))
    for _ in range(25):
        with path.open("rb") as file:
            images = [Image.open(file) for _ in range(8)]
            assert (vectors(tower, images) == expected).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_lazy_images_over_members_of_one_tar(tower: ImageTower, tmp_path: Path, kind: str) -> None:
    images = [scene(seed) for seed in range(8)]
    expected = []
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, image in enumerate(images):
            path = tmp_path / f"{i}.{kind}"
            image.save(path)
            expected.append(vector(Image.open(path)))
            tar.add(path, path.name)
    for _ in range(15):
        with tarfile.open(tmp_path / "a.tar") as tar, ThreadPoolExecutor(2) as callers:
            lazy = [Image.open(tar.extractfile(member)) for member in tar]  # type: ignore[arg-type]
            halves = list(callers.map(lambda part: vectors(tower, part), [lazy[:4], lazy[4:]]))
        np.testing.assert_array_equal(np.concatenate(halves), np.stack(expected))


@pytest.mark.parametrize("kind", ANIMATED)
def test_frames_of_one_image_as_its_iterator_gives_them(tower: ImageTower, tmp_path: Path, kind: str) -> None:
    """The iterator gives the same object again and again, at another frame."""
    path = file_of(tmp_path, kind, n_frames=5)
    with Image.open(path) as image:
        expected = [vector(frame.copy()) for frame in ImageSequence.Iterator(image)]
    assert len({row.tobytes() for row in expected}) == 5
    for _ in range(10):
        with Image.open(path) as image:
            found = vectors(tower, ImageSequence.Iterator(image))
        np.testing.assert_array_equal(found, np.stack(expected))


@pytest.mark.parametrize("kind", ANIMATED)
def test_the_frame_that_a_caller_has_sought_is_taken_and_stays(
    tower: ImageTower, tmp_path: Path, kind: str
) -> None:
    path = file_of(tmp_path, kind, n_frames=4)
    with Image.open(path) as image:
        image.seek(2)
        expected = vector(image.copy())
    with Image.open(path) as image:
        image.seek(2)
        assert (vectors(tower, [image, image]) == expected).all()
        assert image.tell() == 2
        image.seek(3)
        assert not (vectors(tower, [image]) == expected).all()


def reused_array() -> Iterator[Any]:
    buffer = np.zeros((60, 80, 3), np.uint8)
    for level in range(12):
        buffer[:] = level * 20
        yield buffer


def reused_bytearray() -> Iterator[Any]:
    buffer = bytearray()
    for level in range(12):
        file = io.BytesIO()
        Image.new("RGB", (80, 60), (level * 20,) * 3).save(file, "BMP")
        buffer[:] = file.getvalue()
        yield buffer


def reused_memoryview() -> Iterator[Any]:
    for buffer in reused_bytearray():
        yield memoryview(bytes(buffer))[:]


def reused_memory_behind_a_view() -> Iterator[Any]:
    parts = [bytes(buffer) for buffer in reused_bytearray()]
    memory = bytearray(len(parts[0]))
    view = memoryview(memory)
    for part in parts:
        memory[:] = part
        yield view


def reused_image() -> Iterator[Any]:
    image = Image.new("RGB", (80, 60))
    for level in range(12):
        ImageDraw.Draw(image).rectangle((0, 0, 80, 60), fill=(level * 20,) * 3)
        yield image


@pytest.mark.parametrize(
    "reused",
    [reused_array, reused_bytearray, reused_memoryview, reused_memory_behind_a_view, reused_image],
)
def test_a_generator_may_use_one_buffer_for_all(tower: ImageTower, reused: Callable[[], Any]) -> None:
    for _ in range(10):
        found = vectors(tower, reused())
        assert [row[0] for row in found.astype(int)] == [level * 20 for level in range(12)]
        assert (found == found[:, :1]).all()


@pytest.mark.parametrize("reused", [reused_array, reused_bytearray, reused_image])
def test_a_generators_buffer_travels_as_it_was(reused: Callable[[], Any]) -> None:
    rows = [
        file for request in rows_from_images(reused(), per_request=5) for file in request.columns["image"]
    ]
    assert [int(vector(decode(file))[0]) for file in rows] == [level * 20 for level in range(12)]


@pytest.mark.parametrize("kind", ANIMATED)
def test_frames_travel_as_they_were(tmp_path: Path, kind: str) -> None:
    path = file_of(tmp_path, kind, n_frames=5)
    with Image.open(path) as image:
        expected = [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(image)]
        requests = rows_from_images(ImageSequence.Iterator(image), per_request=3)
        files = [file for request in requests for file in request.columns["image"]]
    assert [decode(file).convert("RGB").tobytes() for file in files] == expected


def test_one_image_sent_by_several_threads(tmp_path: Path) -> None:
    """Pillow keeps the options of a save on the image."""
    path = file_of(tmp_path, "png")
    expected = Image.open(path).tobytes()
    with ThreadPoolExecutor(8) as callers:
        for _ in range(20):
            image = Image.open(path)
            files = list(callers.map(lambda i, image=image: bytes_from_image(image, name=f"{i}"), range(8)))
            assert {Image.open(io.BytesIO(file)).tobytes() for file in files} == {expected}


def test_a_strided_view_and_an_array_of_one_memory_are_copied(tower: ImageTower) -> None:
    array = np.asarray(scene()).copy()
    found = vectors(tower, [array, array[::-1], array[:, ::-1], array[::2, ::2]])
    for row, view in zip(found, (array, array[::-1], array[:, ::-1], array[::2, ::2]), strict=True):
        assert (row == vector(Image.fromarray(np.ascontiguousarray(view)))).all()
    data = memoryview(bytearray(b"".join(bytes([b, 0]) for b in png_bytes())))[::2]
    assert (vectors(tower, [data]) == vector(decode(png_bytes()))).all()


def png_bytes() -> bytes:
    file = io.BytesIO()
    scene().save(file, "PNG")
    return file.getvalue()


def test_a_callers_image_is_only_loaded(tmp_path: Path) -> None:
    path = file_of(tmp_path, "png")
    with Image.open(path) as image:
        before = (image.mode, image.size, dict(image.info))
        taken = decode(image)
        assert taken is not image
        assert (image.mode, image.size, dict(image.info)) == before
        ImageDraw.Draw(image).rectangle((0, 0, 400, 400), fill="red")
    assert taken.tobytes() == scene().tobytes()


def test_a_snapshot_is_not_taken_again() -> None:
    taken = snapshot_from_source(scene(), name="3 of the batch")
    assert snapshot_from_source(taken) is taken
    assert decode(taken) is taken.content


def closed_by_with(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image


def closed_itself(path: Path) -> Image.Image:
    image = Image.open(path)
    image.close()
    return image


def file_closed(path: Path) -> Image.Image:
    with path.open("rb") as file:
        return Image.open(file)


@pytest.mark.parametrize("close", [closed_by_with, closed_itself, file_closed])
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff"])
def test_a_closed_image_is_named_as_such(
    tower: ImageTower, tmp_path: Path, kind: str, close: Callable[[Path], Image.Image]
) -> None:
    image = close(file_of(tmp_path, kind))
    with pytest.raises(ImageError, match=r"Image 1 of the batch cannot be decoded: it is already closed"):
        vectors(tower, [scene(), image])


def test_the_first_bad_image_of_a_batch_is_named(tower: ImageTower, tmp_path: Path) -> None:
    lazy = closed_by_with(file_of(tmp_path, "png"))
    with pytest.raises(ImageError, match=r"^Image 1 of the batch, 3 bytes, cannot be decoded"):
        vectors(tower, [scene(), b"bad", lazy])
    with pytest.raises(ImageError, match=r"^Image 1 of the batch cannot be decoded: it is already closed"):
        vectors(tower, [scene(), lazy, b"bad"])
    with pytest.raises(
        ImageError, match=r"^Image 2 of the batch is of type BytesIO.*the result of its read\(\)"
    ):
        vectors(tower, [scene(), scene(), io.BytesIO(png_bytes())])


def test_a_callers_own_error_goes_through(tower: ImageTower) -> None:
    def broken() -> Iterator[Any]:
        yield scene()
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        vectors(tower, broken())


def test_a_read_that_embeds_in_turn_does_not_wait_for_itself(tower: ImageTower) -> None:
    class Nested(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            vectors(tower, [scene()])
            return super().read(size)

    assert (vectors(tower, [Image.open(Nested(png_bytes()))]) == vector(scene())).all()
