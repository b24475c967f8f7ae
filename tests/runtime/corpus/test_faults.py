"""A fault of storage is waited for and never called a row's own; the output is that of a run without any."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_runs import N_FAULTY_RUNS, bad_rows_of, bytes_of, options, output_of, sentences, write_texts
from faulty_storage import faulty_disk, faulty_server
from PIL import Image
from sample_models import Exported

from runtime.corpus import Locations, Reading, embed_corpus, open_source, rows
from runtime.corpus.faults import FaultKind, Patience, fault_kind
from runtime.corpus.pictures import PictureReader
from runtime.corpus.rows import ImageFile, Problem
from runtime.corpus.sources import NumberedRows
from runtime.errors import InputFaultError, MissingSourceError

N_IMAGES = 60


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 4 % 256, number, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    (folder / "img").mkdir()
    for i in range(N_IMAGES):
        (folder / "img" / f"{i}.png").write_bytes(png(i))
    (folder / "img" / "7.png").write_bytes(b"no image")
    texts = sentences(300)
    write_texts(folder / "texts.parquet", texts)
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    return folder


def with_paths(folder: Path, prefix: str) -> Path:
    folder.mkdir(exist_ok=True)
    paths = [f"{prefix}/img/{i}.png" for i in [*range(N_IMAGES), 999]]
    pq.write_table(pa.table({"id": list(range(N_IMAGES + 1)), "image": paths}), folder / "a.parquet")
    return folder / "a.parquet"


def quick(**changes):
    return options(reading=Reading(patience_s=20.0), **changes)


@pytest.mark.parametrize("seed", range(N_FAULTY_RUNS))
def test_pictures_of_a_faulty_server(model, store, tmp_path, seed):
    with faulty_server(store, share=0.0) as server:
        source = with_paths(tmp_path / "t", server.url)
        embed_corpus(model, source, tmp_path / "whole", quick(rows_per_part=16))
        server.share, server._chance = 0.4, random.Random(seed)
        record = embed_corpus(model, source, tmp_path / "out", quick(rows_per_part=16))
        assert sum(server.met.values()) > 10
    assert record.bad_kinds == {"corrupt-image": 1, "missing-file": 1}
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["texts.parquet", "texts.txt"])
@pytest.mark.parametrize("seed", range(N_FAULTY_RUNS))
def test_files_of_a_faulty_server(model, store, tmp_path, name, seed):
    with faulty_server(store, share=0.0) as server:
        source = f"{server.url}/{name}?X-Amz-Signature=abc%2Fdef&x=a*b"
        embed_corpus(model, source, tmp_path / "whole", quick())
        server.share, server._chance, server.n_certain = 0.3, random.Random(seed), 1
        embed_corpus(model, source, tmp_path / "out", quick())
        assert server.met
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert len(output_of(tmp_path / "out")[0]) == 300
    assert b"Signature" not in b"".join(bytes_of(tmp_path / "out").values())
    assert "Signature" not in (tmp_path / "out" / "_run.json").read_text()


@pytest.mark.parametrize("seed", range(N_FAULTY_RUNS))
def test_a_faulty_disk(model, store, tmp_path, monkeypatch, seed):
    source = with_paths(tmp_path / "t", str(store))
    texts = store / "texts.parquet"
    for name, which in (("texts", texts), ("paths", source), ("folder", store / "img")):
        embed_corpus(model, which, tmp_path / "whole" / name, quick(rows_per_part=16))
    met = faulty_disk(monkeypatch, share=0.3, seed=seed)
    for name, which in (("texts", texts), ("paths", source), ("folder", store / "img")):
        embed_corpus(model, which, tmp_path / "out" / name, quick(rows_per_part=16))
    assert met["EIO"]
    assert met["EMFILE"]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.fixture
def disk(store: Path, tmp_path: Path) -> Path:
    """A folder of the pictures that may be moved away."""
    (tmp_path / "disk" / "img").mkdir(parents=True)
    for path in (store / "img").iterdir():
        (tmp_path / "disk" / "img" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "disk"


def at_read(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Call ``act`` before a picture is read, counted from 1."""
    real, numbers = rows.fetched, itertools.count(1)

    def fetches(filesystem, path):
        if next(numbers) == number:
            act()
        return real(filesystem, path)

    monkeypatch.setattr(rows, "fetched", fetches)


@pytest.mark.parametrize("how", ["renamed", "emptied"])
def test_a_folder_that_goes_away_leaves_parts_undone_and_a_repeat_completes_them(
    model, disk, tmp_path, monkeypatch, how
):
    source = with_paths(tmp_path / "t", str(disk))
    embed_corpus(model, source, tmp_path / "whole", options(rows_per_part=16))

    def unmount():
        disk.rename(tmp_path / "gone")
        if how == "emptied":
            disk.mkdir()

    at_read(monkeypatch, 40, unmount)
    run = options(rows_per_part=16, reading=Reading(patience_s=0.3))
    with pytest.raises(InputFaultError, match=r"run the same command again") as raised:
        embed_corpus(model, source, tmp_path / "out", run)
    assert raised.value.exit_code == 75
    assert len(output_of(tmp_path / "out")[0]) == 31  # the two parts before, without the bad row
    if disk.exists():
        disk.rmdir()
    (tmp_path / "gone").rename(disk)
    embed_corpus(model, source, tmp_path / "out", run)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_folder_that_comes_back_in_time_costs_nothing(model, disk, tmp_path, monkeypatch):
    source = with_paths(tmp_path / "t", str(disk))
    embed_corpus(model, source, tmp_path / "whole", options(rows_per_part=16))
    timer = threading.Timer(1.2, lambda: (tmp_path / "gone").rename(disk))
    at_read(monkeypatch, 40, lambda: (disk.rename(tmp_path / "gone"), timer.start()))
    embed_corpus(model, source, tmp_path / "out", options(rows_per_part=16))
    timer.join()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@contextlib.contextmanager
def coming_and_going(folder: Path, seed: int) -> Iterator[list[float]]:
    """Take a folder away and bring it back at random moments; yield the seconds of each absence."""
    chance, ended, absences = random.Random(seed), threading.Event(), []
    away = folder.with_name("away")

    def come_and_go() -> None:
        while not ended.wait(chance.uniform(0.01, 0.2)):
            folder.rename(away)
            if is_emptied := chance.random() < 0.5:
                folder.mkdir()
            absences.append(chance.uniform(0.0, 0.4))
            ended.wait(absences[-1])
            if is_emptied:
                folder.rmdir()
            away.rename(folder)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        yield absences
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("patience_s", [20.0, 0.15])
@pytest.mark.parametrize("seed", range(N_FAULTY_RUNS))
def test_a_mount_that_comes_and_goes(model, disk, tmp_path, seed, patience_s):
    """The patient run waits for it; what the other one leaves undone, one repeat completes."""
    source = with_paths(tmp_path / "t", str(disk))
    embed_corpus(model, source, tmp_path / "whole", options(rows_per_part=16))
    run = options(rows_per_part=16, max_bad_share=1.0, reading=Reading(patience_s=patience_s))
    may_end_early = contextlib.suppress(InputFaultError) if patience_s < 1 else contextlib.nullcontext()
    with coming_and_going(disk, seed) as absences:
        with may_end_early:
            embed_corpus(model, source, tmp_path / "out", run)
        assert absences
    embed_corpus(model, source, tmp_path / "out", options(rows_per_part=16))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_folder_that_was_away_from_the_start_is_read_by_a_repeat(model, store, tmp_path):
    source = with_paths(tmp_path / "t", str(tmp_path / "disk"))
    run = options(rows_per_part=16, max_bad_share=1.0, reading=Reading(patience_s=0.1))
    record = embed_corpus(model, source, tmp_path / "out", run)
    assert record.bad_kinds == {"missing-folder": N_IMAGES + 1}
    (tmp_path / "disk").symlink_to(store)
    assert embed_corpus(model, source, tmp_path / "out", run).bad_kinds == {
        "corrupt-image": 1,
        "missing-file": 1,
    }
    embed_corpus(model, source, tmp_path / "whole", run)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_one_file_that_fails_leaves_its_part_undone_and_the_others_are_done(model, store, tmp_path):
    with faulty_server(store, share=0.0) as server:
        source = with_paths(tmp_path / "t", server.url)
        embed_corpus(model, source, tmp_path / "whole", quick(rows_per_part=16))
        server.statuses["/img/20.png"] = 500
        impatient = options(rows_per_part=16, reading=Reading(patience_s=0.5))
        with pytest.raises(InputFaultError, match=r"1 parts are left undone.*img/20\.png"):
            embed_corpus(model, source, tmp_path / "out", impatient)
        assert len(output_of(tmp_path / "out")[0]) == N_IMAGES - 1 - 16
        skipping = options(rows_per_part=16, reading=Reading(patience_s=0.2, skip_bad_files=True))
        record = embed_corpus(model, source, tmp_path / "skipped", skipping)
        assert record.bad_kinds["unreadable-file"] == 1
        del server.statuses["/img/20.png"]
        embed_corpus(model, source, tmp_path / "out", impatient)
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_store_that_is_down_ends_the_run_with_its_own_code(model, store, tmp_path):
    with faulty_server(store, share=1.0) as server:
        source = with_paths(tmp_path / "t", server.url)
        with pytest.raises(InputFaultError, match="tried again for"):
            embed_corpus(model, source, tmp_path / "out", options(reading=Reading(patience_s=0.3)))
        with pytest.raises(InputFaultError):
            open_source(f"{server.url}/texts.txt", reading=Reading(patience_s=0.3))
    with faulty_server(store, share=0.0) as server, pytest.raises(MissingSourceError):
        open_source(f"{server.url}/nothing.txt", reading=Reading(patience_s=0.3))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, FaultKind.ABSENT),
        (410, FaultKind.ABSENT),
        (403, FaultKind.DENIED),
        (400, FaultKind.OWN),
        (429, FaultKind.PASSING),
        (503, FaultKind.PASSING),
    ],
)
def test_answers_of_a_server_by_class(store, status, kind):
    with faulty_server(store, share=0.0) as server:
        server.statuses["/img/1.png"] = status
        (item,) = (
            open_source({"image": [f"{server.url}/img/1.png"]})
            .read(0, lambda start, stop: True)
            .__next__()
            .items
        )
        with pytest.raises(Exception) as raised:  # noqa: PT011 - any class: that is what is classified
            item.fetched()
        assert fault_kind(raised.value) is kind


def test_a_missing_file_is_its_rows_own_only_beside_others(tmp_path):
    from pyarrow.fs import LocalFileSystem

    local = LocalFileSystem()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.png").write_bytes(png(1))
    (tmp_path / "empty").mkdir()
    reader = PictureReader(Patience(0.05))
    missing, _ = reader.read(ImageFile(local, str(tmp_path / "full" / "b.png")))
    assert missing.kind == "missing-file"
    with pytest.raises(InputFaultError, match="its disk or mount may be away"):
        reader.read(ImageFile(local, str(tmp_path / "empty" / "b.png")))
    folder, _ = reader.read(ImageFile(local, str(tmp_path / "none" / "b.png")))
    assert folder.kind == "missing-folder"
    reader.read(ImageFile(local, str(tmp_path / "full" / "a.png")))
    beside, _ = reader.read(ImageFile(local, str(tmp_path / "none" / "b.png")))
    assert beside.kind == "missing-file"
    of_a_folder, _ = reader.read(ImageFile(local, str(tmp_path / "full")))
    assert of_a_folder.kind == "unreadable-file"


def test_a_link_is_judged_by_the_place_of_its_target(tmp_path):
    from pyarrow.fs import LocalFileSystem

    def link(name, target):
        (tmp_path / "in" / name).symlink_to(target)
        return ImageFile(LocalFileSystem(), str(tmp_path / "in" / name))

    for name in ("in", "objects/one", "unmounted"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "objects" / "one" / "a").write_bytes(png(1))
    reader = PictureReader(Patience(0.05))
    missing, _ = reader.read(link("b.png", "../objects/one/b"))
    assert missing.kind == "missing-file"
    assert f"b.png is a link to {tmp_path}/objects/one/b, which does not exist" in missing.reason
    # as git-annex leaves what was not fetched: its part is embedded again once the folder is there
    absent, picture = reader.read(link("c.png", "../objects/two/c"))
    assert (absent.kind, picture.path) == ("missing-folder", str(tmp_path / "objects" / "two" / "c"))
    with pytest.raises(InputFaultError, match=r"a link to .*/unmounted/d\) is missing.*--skip-bad-files"):
        reader.read(link("d.png", "../unmounted/d"))
    assert isinstance(reader.read(link("a.png", "../objects/one/a"))[0], bytes)
    (tmp_path / "objects").rename(tmp_path / "away")  # what was seen is gone with it
    with pytest.raises(InputFaultError, match="its disk or mount may be away"):
        reader.read(link("e.png", "../objects/one/e"))


def test_a_stream_continues_where_it_failed(store):
    with faulty_server(store, share=0.0) as server:
        source = open_source(Locations([f"{server.url}/texts.txt", f"{server.url}/texts.txt?again"]))
        server.share = 0.5
        items = [item for piece in NumberedRows(source, lambda start, stop: True) for item in piece.items]
    assert items == sentences(300) * 2
    assert not any(isinstance(item, Problem) for item in items)


def test_bad_rows_are_tried_again_when_asked(model, store, tmp_path):
    source = with_paths(tmp_path / "t", str(store))
    embed_corpus(model, source, tmp_path / "out", options(rows_per_part=16))
    assert [row["kind"] for row in bad_rows_of(tmp_path / "out")] == ["corrupt-image", "missing-file"]
    (store / "img" / "999.png").write_bytes(png(99))
    try:
        record = embed_corpus(
            model, source, tmp_path / "out", options(rows_per_part=16, retry_bad=("missing-file",))
        )
        assert record.bad_kinds == {"corrupt-image": 1}
        assert record.this_run.rows == 13
        assert [row["kind"] for row in bad_rows_of(tmp_path / "out")] == ["corrupt-image"]
        embed_corpus(model, source, tmp_path / "whole", options(rows_per_part=16))
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    finally:
        (store / "img" / "999.png").unlink()
