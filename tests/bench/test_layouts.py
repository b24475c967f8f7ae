"""Each layout on a tiny generated folder: what is read, and how each kind of damage is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from bench.datasets import (
    LAYOUTS,
    CaptionChoice,
    Captions,
    ImageBytes,
    MissingImages,
    ReadOptions,
    RetrievalSet,
    TarSlice,
    Translator,
    read,
)
from bench.datasets.language_maps import LanguageMap, flores_code
from runtime.errors import DatasetError


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())


def make_xtd10(folder: Path) -> None:
    write_lines(folder / "captions/test_image_names.txt", "a.jpg", "b.jpg", "c.jpg")
    write_lines(folder / "captions/test_1kcaptions_en.txt", "one", "two", "three")
    write_lines(folder / "captions/test_1kcaptions_zh.txt", "一", "二", "三")
    write_images(folder / "images", "a.jpg", "b.jpg", "c.jpg")


def make_xtd200(folder: Path) -> None:
    write_lines(folder / "test_image_names.txt", "a.jpg", "b.jpg", "c.jpg")
    write_lines(folder / "eng_Latn.txt", "one", "two", "three")
    write_lines(folder / "zho_Hans.txt", "一", "二", "三")
    write_images(folder / "images", "a.jpg", "b.jpg", "c.jpg")


def make_flickr30k_200(folder: Path) -> None:
    make_xtd200(folder)
    (folder / "test_image_names.txt").rename(folder / "filenames.txt")
    write_lines(folder / "eng_captions.txt", "not", "a language")


def make_flickr30k_cn(folder: Path) -> None:
    write_lines(folder / "test.txt", "7#zhm#0\t一", "7#zhm#1\t二", "9#zhm#0\t三")
    write_lines(folder / "val.txt", "3\t一", "3\t二", "5\t三")
    write_images(folder / "images", "7.jpg", "9.jpg", "3.jpg", "5.jpg")


def make_coco_cn(folder: Path) -> None:
    rows = [("cn", 8, "一 个"), ("zhm", 8, "二"), ("zhm", 14, "三")]
    data = {
        "images": [{"id": 8, "file_name": "x.jpg"}, {"id": 14, "file_name": "y.jpg"}],
        "annotations": [{"source": s, "image_id": i, "caption": c, "id": 5} for s, i, c in rows],
    }
    write_lines(folder / "captions.json", json.dumps(data))
    write_images(folder / "images", "x.jpg", "y.jpg")


def make_crossmodal3600(folder: Path) -> None:
    rows = [
        {
            "image/key": "k1",
            "image/locale": "no",
            "en": {"caption": ["one", "uno"]},
            "no": {"caption": ["en"]},
        },
        {"image/key": "k2", "en": {"caption": ["two"]}, "no": {"caption": []}},
    ]
    write_lines(folder / "captions.jsonl", *(json.dumps(row) for row in rows))
    write_images(folder / "images", "k1.jpg", "k2.jpg")


def make_capivara(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ten = [f"{name}{n}" for n in range(5) for name in ("marian", "google")]
    write_tar(
        folder / "00.tar",
        {
            "s/1.jpg": b"picture 1",
            "s/1.json": json.dumps({"captions-en": ["one"], "captions-pt": ten}).encode(),
            "s/2.png": b"picture 2",
            "s/2.json": json.dumps({"captions-en": ["two"], "captions-pt": ["original"]}).encode(),
        },
    )


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


MAKERS = {
    "xtd10": make_xtd10,
    "xtd200": make_xtd200,
    "flickr30k-200": make_flickr30k_200,
    "flickr30k-cn": make_flickr30k_cn,
    "flickr30k-cn-val": make_flickr30k_cn,
    "coco-cn": make_coco_cn,
    "crossmodal3600": make_crossmodal3600,
    "capivara": make_capivara,
}

TEN_MARIAN = tuple(f"marian{n}" for n in range(5))
TEN_GOOGLE = tuple(f"google{n}" for n in range(5))


def test_every_layout_is_covered():
    assert set(LAYOUTS) == {*MAKERS, "emoji"}


@pytest.mark.parametrize(
    ("name", "keys", "captions"),
    [
        (
            "xtd10",
            ["a.jpg", "b.jpg", "c.jpg"],
            [
                Captions("en", "eng_Latn", ("one", "two", "three"), (0, 1, 2)),
                Captions("zh", "zho_Hans", ("一", "二", "三"), (0, 1, 2)),
            ],
        ),
        (
            "xtd200",
            ["a.jpg", "b.jpg", "c.jpg"],
            [
                Captions("eng_Latn", "eng_Latn", ("one", "two", "three"), (0, 1, 2)),
                Captions("zho_Hans", "zho_Hans", ("一", "二", "三"), (0, 1, 2)),
            ],
        ),
        (
            "flickr30k-200",
            ["a.jpg", "b.jpg", "c.jpg"],
            [
                Captions("eng_Latn", "eng_Latn", ("one", "two", "three"), (0, 1, 2)),
                Captions("zho_Hans", "zho_Hans", ("一", "二", "三"), (0, 1, 2)),
            ],
        ),
        ("flickr30k-cn", ["7", "9"], [Captions("zhm", "zho_Hans", ("一", "二", "三"), (0, 0, 1))]),
        ("flickr30k-cn-val", ["3", "5"], [Captions("zhm", "zho_Hans", ("一", "二", "三"), (0, 0, 1))]),
        (
            "coco-cn",
            ["x.jpg", "y.jpg"],
            [
                Captions("cn", "zho_Hans", ("一 个",), (0,)),
                Captions("zhm", "zho_Hans", ("二", "三"), (0, 1)),
            ],
        ),
        (
            "crossmodal3600",
            ["k1", "k2"],
            [
                Captions("en", "eng_Latn", ("one", "uno", "two"), (0, 0, 1)),
                Captions("no", "nob_Latn", ("en",), (0,)),
            ],
        ),
    ],
)
def test_a_layout_is_read(name, keys, captions, tmp_path):
    MAKERS[name](tmp_path)
    dataset = read(name, tmp_path)
    assert [image.key for image in dataset.images] == keys
    assert list(dataset.captions) == captions
    assert all(image.read() for image in dataset.images)


@pytest.mark.parametrize(
    ("translator", "first"),
    [
        (Translator.GOOGLE, TEN_GOOGLE),
        (Translator.MARIAN, TEN_MARIAN),
        (Translator.ALL, tuple(t for pair in zip(TEN_MARIAN, TEN_GOOGLE, strict=True) for t in pair)),
    ],
)
def test_capivara_chooses_a_translator(translator, first, tmp_path):
    make_capivara(tmp_path)
    dataset = read("capivara", tmp_path, ReadOptions(translator=translator))
    english, portuguese = dataset.captions
    assert english == Captions("en", "eng_Latn", ("one", "two"), (0, 1))
    assert portuguese.texts == (*first, "original")
    assert portuguese.image_of == (0,) * len(first) + (1,)
    assert [image.read() for image in dataset.images] == [b"picture 1", b"picture 2"]
    assert isinstance(dataset.images[0], TarSlice)
    assert translator.value in dataset.notes[0]


def test_capivara_reads_one_tar_by_name(tmp_path):
    make_capivara(tmp_path)
    assert len(read("capivara", tmp_path / "00.tar").images) == 2


def test_first_captions_alone_as_clip_benchmark_scores(tmp_path):
    make_crossmodal3600(tmp_path)
    dataset = read("crossmodal3600", tmp_path, ReadOptions(captions=CaptionChoice.FIRST))
    assert dataset.captions[0].texts == ("one", "two")
    assert "CLIP_benchmark" in dataset.notes[0]


def test_captions_keep_unicode_line_separators(tmp_path):
    make_xtd200(tmp_path)
    write_lines(tmp_path / "eng_Latn.txt", "one\u2028more", "two\x85", "three")
    assert read("xtd200", tmp_path).captions[0].texts == ("one\u2028more", "two\x85", "three")


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "capivara"])
def test_an_absent_image_is_refused_or_dropped_with_its_captions(name, tmp_path):
    MAKERS[name](tmp_path)
    before = read(name, tmp_path)
    before.images[0].path.unlink()
    with pytest.raises(DatasetError, match=r"1 of \d listed images are missing; the first is .*jpg"):
        read(name, tmp_path)
    after = read(name, tmp_path, ReadOptions(missing_images=MissingImages.DROP))
    assert after.images == before.images[1:]
    assert "results are not comparable" in after.notes[-1]
    for entry in after.captions:
        old = next(captions for captions in before.captions if captions.code == entry.code)
        kept = [(t, i - 1) for t, i in zip(old.texts, old.image_of, strict=True) if i > 0]
        assert list(zip(entry.texts, entry.image_of, strict=True)) == kept


def test_all_images_absent_cannot_be_dropped(tmp_path):
    make_xtd10(tmp_path)
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    with pytest.raises(DatasetError, match=r"3 of 3 .*Copy or link the images there\."):
        read("xtd10", tmp_path, ReadOptions(missing_images=MissingImages.DROP))


def damage_line_count(folder: Path) -> None:
    write_lines(folder / "captions/test_1kcaptions_zh.txt", "一", "二")


def damage_empty_line(folder: Path) -> None:
    write_lines(folder / "captions/test_1kcaptions_zh.txt", "一", "", "三")


def damage_encoding(folder: Path) -> None:
    (folder / "captions/test_1kcaptions_zh.txt").write_bytes("一\n二\n三\n".encode("gb2312"))


def damage_names(folder: Path) -> None:
    (folder / "captions/test_image_names.txt").unlink()


def damage_language(folder: Path) -> None:
    write_lines(folder / "captions/test_1kcaptions_xx.txt", "一", "二", "三")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_line_count, r"test_1kcaptions_zh.txt has 2 lines; .*test_image_names.txt lists 3 images"),
        (damage_empty_line, r"test_1kcaptions_zh.txt, line 2 is empty"),
        (damage_encoding, r"test_1kcaptions_zh.txt cannot be read as UTF-8"),
        (damage_names, r"test_image_names.txt is missing. Expected layout"),
        (damage_language, r"Language code 'xx' is not a FLORES-200 code, and the right language map"),
    ],
)
def test_aligned_lines_are_checked(damage, message, tmp_path):
    make_xtd10(tmp_path)
    damage(tmp_path)
    with pytest.raises(DatasetError, match=message):
        read("xtd10", tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_folder_names_the_expected_layout(name, tmp_path):
    with pytest.raises(DatasetError, match=r"Expected layout:\n +FOLDER/"):
        read(name, tmp_path)


@pytest.mark.parametrize("line", ["7#zhm\tcaption", "7#zhm#0 caption", "#zhm#0\tcaption", "7#zhm#0\t "])
def test_a_malformed_flickr30k_cn_line_is_refused(line, tmp_path):
    write_lines(tmp_path / "test.txt", "7#zhm#0\t一", line)
    with pytest.raises(DatasetError, match=r"test.txt, line 2 is .*expected IMAGE#zhm#N<TAB>caption"):
        read("flickr30k-cn", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "captions.json is not JSON"),
        ('{"images": []}', "captions.json lacks 'annotations'"),
        (
            '{"images": [], "annotations": [{"source": "cn", "image_id": 3, "caption": "c"}]}',
            "names image 3, which 'images' does not list",
        ),
    ],
)
def test_malformed_coco_cn_is_refused(text, message, tmp_path):
    write_lines(tmp_path / "captions.json", text)
    with pytest.raises(DatasetError, match=message):
        read("coco-cn", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "captions.jsonl, line 1 is not JSON"), ("{}", "image/key"), ("[]", "captions.jsonl")],
)
def test_malformed_crossmodal3600_is_refused(line, message, tmp_path):
    write_lines(tmp_path / "captions.jsonl", line)
    with pytest.raises(DatasetError, match=message):
        read("crossmodal3600", tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"x"}, "1 samples lack their image or their captions; the first is '1'"),
        ({"1.json": b"{}"}, "1 samples lack"),
        ({"1.jpg": b"x", "1.json": b"{"}, "1.json is not JSON"),
        ({"1.jpg": b"x", "1.json": b"[]"}, "1.json is not a JSON object"),
        ({"1.jpg": b"x", "1.json": b'{"captions-pt": "text"}'}, "captions-pt is not a list of strings"),
    ],
)
def test_malformed_capivara_is_refused(members, message, tmp_path):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DatasetError, match=message):
        read("capivara", tmp_path)


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DatasetError, match="cannot be read as an uncompressed tar"):
        read("capivara", tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [("xtd11", Path(), "No layout is named 'xtd11'"), ("xtd10", None, "needs its folder; pass --data")],
)
def test_options_that_cannot_be_read(name, folder, message):
    with pytest.raises(DatasetError, match=message):
        read(name, folder)


@pytest.mark.parametrize(
    ("code", "paper", "right"),
    [
        ("zh", "zho_Hant", "zho_Hans"),
        ("cn", "zho_Hant", "zho_Hans"),
        ("zhm", "yue_Hant", "zho_Hans"),
        ("no", "nno_Latn", "nob_Latn"),
        ("jp", "jpn_Jpan", "jpn_Jpan"),
        ("quz", "quy_Latn", "quy_Latn"),
        ("fil", "tgl_Latn", "tgl_Latn"),
        ("ace_Arab", "ace_Arab", "ace_Arab"),
    ],
)
def test_language_maps(code, paper, right):
    assert flores_code(code, LanguageMap.PAPER) == paper
    assert flores_code(code, LanguageMap.RIGHT) == right


def small_set() -> RetrievalSet:
    images = (ImageBytes("a", b"1"), ImageBytes("b", b"2"))
    captions = (
        Captions("cn", "zho_Hans", ("x",), (1,)),
        Captions("zhm", "zho_Hans", ("y", "z"), (0, 1)),
        Captions("en", "eng_Latn", ("e",), (0,)),
    )
    return RetrievalSet("small", images, captions)


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (["en"], ("en",)),
        (["zho_Hans"], ("cn", "zhm")),
        (["zhm", "cn"], ("cn", "zhm")),
        (["zh-CN", "en-US"], ("cn", "zhm", "en")),
    ],
)
def test_languages_are_selected_by_own_or_any_language_code(wanted, kept):
    assert small_set().select(wanted).codes == kept


def test_an_unknown_language_is_refused():
    with pytest.raises(DatasetError, match=r"no captions in \['fr'\]; it has \['cn', 'zhm', 'en'\]"):
        small_set().select(["en", "fr"])


def test_relevance_points_captions_at_images():
    relevance = small_set().relevance(small_set().captions[1])
    assert relevance.items.tolist() == [0, 1]
    assert (relevance.n_queries, relevance.n_items) == (2, 2)


def test_a_language_without_captions_is_refused():
    with pytest.raises(DatasetError, match="at least one"):
        Captions("en", "eng_Latn", (), ())


@pytest.mark.parametrize("codes", [(), ("en", "en")])
def test_a_set_needs_languages_once_each(codes):
    captions = tuple(Captions(code, "eng_Latn", ("x",), (0,)) for code in codes)
    with pytest.raises(DatasetError, match="no language twice"):
        RetrievalSet("small", (ImageBytes("a", b"1"),), captions)


def test_the_emoji_samples_are_read():
    pytest.importorskip("pyarrow")
    dataset = read("emoji")
    assert len(dataset.images) == 1911
    assert len(dataset.captions) == 106
    portuguese = dataset.select(["por_Latn"]).captions[0]
    pineapple = portuguese.texts.index("abacaxi")
    assert dataset.images[portuguese.image_of[pineapple]].key == "🍍"
