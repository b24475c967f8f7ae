"""Tars as they are met: links, devices, sparse files, repeated names and several images of a sample."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from runtime.corpus import Columns, Reading, open_source
from runtime.corpus.rows import Problem
from runtime.corpus.sources import NumberedRows
from runtime.errors import DamagedFileError


def rows_of(source):
    found = list(NumberedRows(source, lambda start, stop: True))
    return [i for rows in found for i in rows.ids], [item for rows in found for item in rows.items]


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")
HARD, SOFT, PIPE, DEVICE = tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE


def tar_of(*members):
    """Return a tar of (name, content) and (name, type, target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if len(rest) == 1:
                info.size = len(rest[0])
                tar.addfile(info, io.BytesIO(rest[0]))
            else:
                info.type, info.linkname = rest
                tar.addfile(info)
    return buffer.getvalue()


LINKS = tar_of(
    ("./a/000.png", RED),
    ("b/001.png", BLUE),
    ("a/002.png", HARD, "./a/000.png"),
    ("a/003.png", SOFT, "000.png"),
    ("a/004.png", SOFT, "../b/001.png"),
    ("a/005.png", SOFT, "006.png"),
    ("a/006.png", HARD, "b/001.png"),
    ("v1.2", SOFT, "a"),
    ("a/007.png", SOFT, "008.png"),
    ("a/008.png", RED),
)
LINKED = {
    "./a/000": RED, "b/001": BLUE, "a/002": RED, "a/003": RED, "a/004": BLUE, "a/005": BLUE, "a/006": BLUE,
    "a/007": RED, "a/008": RED,
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2"])
def test_links_have_the_content_of_what_they_lead_to(tmp_path, suffix):
    pack = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress}[suffix]
    (tmp_path / f"x.{suffix}").write_bytes(pack(LINKS))
    ids, items = rows_of(open_source(tmp_path / f"x.{suffix}"))
    assert dict(zip(ids, items, strict=True)) == LINKED


def test_a_link_that_leads_nowhere_is_a_bad_row_that_names_its_target(tmp_path):
    (tmp_path / "x.tar").write_bytes(
        tar_of(
            ("0.png", RED),
            ("1.png", SOFT, "/data/1.png"),
            ("2.png", SOFT, "../2.png"),
            ("3.png", HARD, "9.png"),
            ("4.png", SOFT, "5.png"),
            ("5.png", SOFT, "4.png"),
            ("9.png", BLUE),
        )
    )
    ids, items = rows_of(open_source(tmp_path / "x.tar"))
    assert ids == ["0", "1", "2", "3", "4", "5", "9"]
    assert [items[0], items[6]] == [RED, BLUE]
    assert {item.kind for item in items[1:6]} == {"unresolved-link"}
    assert "1.png is a link to /data/1.png, which cannot be read" in items[1].reason
    assert "before the link" in items[3].reason
    assert "in a circle" in items[4].reason


def test_pipes_and_devices_are_bad_rows(tmp_path):
    (tmp_path / "x.tar").write_bytes(
        tar_of(("0.png", RED), ("1.png", PIPE, ""), ("dev/null", DEVICE, ""), ("2.png", SOFT, "1.png"))
    )
    ids, items = rows_of(open_source(tmp_path / "x.tar"))
    assert ids == ["0", "1", "dev/null", "2"]
    assert [item.kind for item in items[1:]] == ["not-a-file", "not-a-file", "unresolved-link"]
    assert "1.png is a named pipe" in items[1].reason


@pytest.mark.skipif(sys.platform == "win32", reason="GNU tar")
def test_what_gnu_tar_makes_of_links_and_sparse_files(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "0.png").write_bytes(RED)
    os.link(folder / "0.png", folder / "1.png")
    (folder / "2.png").symlink_to("0.png")
    with (folder / "3.png").open("wb") as file:
        file.write(BLUE)
        file.truncate(1 << 20)
    for form in ("gnu", "posix"):
        names = sorted(path.name for path in folder.iterdir())
        command = ["tar", "-S", f"--format={form}", "-cf", tmp_path / "x.tar", "-C", folder, *names]
        subprocess.run(command, check=True)
        assert (tmp_path / "x.tar").stat().st_size < 1 << 20
        ids, items = rows_of(open_source(tmp_path / "x.tar"))
        assert ids == ["0", "1", "2", "3"]
        assert items[:3] == [RED] * 3
        assert items[3] == BLUE + bytes((1 << 20) - len(BLUE))


def test_a_compressed_tar_is_not_decompressed_for_every_link(tmp_path):
    files = [(f"{i:03d}.png", png((i, 0, 0))) for i in range(100)]
    links = [(f"l{i:03d}.png", HARD, f"{99 - i:03d}.png") for i in range(100)]
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar_of(*files, *links)))
    items = rows_of(open_source(tmp_path / "x.tar.gz"))[1]
    assert items[100:164] == [content for _, content in reversed(files)][:64]
    assert {item.kind for item in items[164:]} == {"unresolved-link"}
    assert "decompress it first" in items[164].reason
    (tmp_path / "y.tar").write_bytes(tar_of(*files, *links))
    assert rows_of(open_source(tmp_path / "y.tar"))[1][100:] == [c for _, c in reversed(files)]


def test_links_before_the_damage_of_a_tar_are_read(tmp_path):
    whole = tar_of(("0.png", RED), ("1.png", HARD, "0.png"), ("2.png", BLUE), ("3.png", BLUE))
    (tmp_path / "x.tar").write_bytes(whole[: whole.index(b"3.png") + 100])
    with pytest.raises(DamagedFileError):
        rows_of(open_source(tmp_path / "x.tar"))
    source = open_source(tmp_path / "x.tar", reading=Reading(skip_bad_files=True))
    assert rows_of(source)[1][:2] == [RED, RED]


def test_a_link_on_standard_input_is_a_bad_row(monkeypatch):
    content = tar_of(("0.png", RED), ("1.png", HARD, "0.png"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    items = rows_of(open_source("-", format="webdataset", name="x"))[1]
    assert items[0] == RED
    assert "write it to a file" in items[1].reason


REPEATED = {
    "side by side": ([("e.png", RED), ("e.png", BLUE), ("f.png", RED)], ["e", "f"], [0]),
    "apart": ([("e.png", RED), ("f.png", BLUE), ("e.png", RED)], ["e", "f", "e"], [2]),
    "with its caption": (
        [("e.png", RED), ("e.txt", b"e"), ("f.png", BLUE), ("e.png", RED), ("e.txt", b"e")],
        ["e", "f", "e"],
        [2],
    ),
    "image and caption apart": ([("e.png", RED), ("f.png", BLUE), ("e.txt", b"e")], ["e", "f", "e"], [2]),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_name_that_is_repeated_makes_a_bad_row_that_names_both_places(tmp_path, name):
    members, expected, bad = REPEATED[name]
    data = tar_of(*members)
    (tmp_path / "x.tar").write_bytes(data)
    ids, items = rows_of(open_source(tmp_path / "x.tar"))
    assert ids == expected
    assert [i for i, item in enumerate(items) if isinstance(item, Problem)] == bad
    problem = items[bad[0]]
    second = [i for i in range(0, len(data), 512) if data[i : i + 2] == b"e."][1 if bad == [0] else -1]
    assert problem.kind == "ambiguous-sample"
    assert "0" in problem.reason
    if name != "with its caption":
        assert f"{second:,}" in problem.reason


def test_tars_in_one_file_may_repeat_keys(tmp_path):
    one, other = tar_of(("0.png", RED), ("1.png", RED)), tar_of(("1.png", BLUE), ("0.png", HARD, "1.png"))
    (tmp_path / "x.tar").write_bytes(one + other)
    assert rows_of(open_source(tmp_path / "x.tar")) == (["0", "1", "1", "0"], [RED, RED, BLUE, BLUE])


def test_several_images_of_a_sample_are_chosen_by_extension(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of(("a.jpg", RED), ("a.png", BLUE), ("b.jpg", BLUE)))
    ids, items = rows_of(open_source(tmp_path / "x.tar"))
    assert (ids, items[1]) == (["a", "b"], BLUE)
    assert items[0].kind == "ambiguous-sample"
    assert "['jpg', 'png']. Choose one with --image jpg" in items[0].reason
    assert rows_of(open_source(tmp_path / "x.tar", columns=Columns(image="jpg")))[1] == [RED, BLUE]


def test_an_image_file_is_taken_before_a_field_of_its_name(tmp_path):
    content = tar_of(("a.json", b'{"image": "elsewhere.png", "caption": "x"}'), ("a.png", RED))
    (tmp_path / "x.tar").write_bytes(content)
    assert rows_of(open_source(tmp_path / "x.tar", columns=Columns(image="image")))[1] == [RED]
