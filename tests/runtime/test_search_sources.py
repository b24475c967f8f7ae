"""From a sample model to a page of pictures: galleries, vectors and indexes are searched by one command."""

from __future__ import annotations

import io
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from sample_models import ROOT
from typer.testing import CliRunner
from vector_folders import unit_vectors, write_shard

pytest.importorskip("faiss")

from runtime import Encoder, InputError, VectorIndex
from runtime.commands.app import app
from runtime.indexes.exact import Hit
from runtime.manifest import Modality
from runtime.search.answers import Answer, Answers, Query
from runtime.search.page import page_from_answers, write_page
from runtime.search.pictures import data_uri, pictures_of_gallery, pictures_of_ids

GALLERY = ROOT / "samples" / "emoji" / "gallery.parquet"
SEARCHES = {
    "por_Latn": ("gato preto", "🐈‍⬛"),
    "zho_Hans": ("狗", "🐕"),
    "arb_Arab": ("أناناس", "🍍"),
    "hin_Deva": ("नारियल", "🥥"),
    "jpn_Jpan": ("いちご", "🍓"),
    "kor_Hang": ("무지개", "🌈"),
    "rus_Cyrl": ("подсолнух", "🌻"),
    "ell_Grek": ("λεμόνι", "🍋"),
    "heb_Hebr": ("אוטובוס", "🚌"),
    "swh_Latn": ("tikitimaji", "🍉"),
}
"""Ten languages: what is asked for, and what has to be among the five best. Its recall@10 is 78 %."""


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def model(exported):
    return exported("nllb-clip")


@pytest.fixture(scope="module")
def vectors(model, tmp_path_factory):
    """The gallery's images, embedded by the command."""
    out = tmp_path_factory.mktemp("gallery") / "vectors"
    options = ["--id", "emoji", "--engine", "onnxruntime", "--precision", "fp32", "--threads", 1]
    succeed("embed", model, GALLERY, "--out", out, "--image", "image", "--instances", 1, *options)
    return out


@pytest.fixture(scope="module")
def indexes(vectors):
    for kind in ("flat", "hnsw", "ivf-pq"):
        succeed("index", vectors, "--out", vectors.parent / kind, "--kind", kind, "--threads", 1)
    return vectors.parent


def hits(*arguments):
    return json.loads(succeed("search", *arguments, "--json").stdout)


@pytest.mark.parametrize("source", ["vectors", "flat", "hnsw", "ivf-pq"])
def test_every_source_gives_the_gallerys_answers(model, indexes, source):
    asked = ["gato preto", "--language", "por_Latn", "--threads", 1, "-k", 5]
    expected = hits(model, GALLERY, *asked)
    found = hits(model, indexes / source, *asked)
    assert [hit["id"] for hit in found][:1] == [hit["image"] for hit in expected][:1] == ["🐈‍⬛"]
    if source != "ivf-pq":
        assert [hit["id"] for hit in found] == [hit["image"] for hit in expected]
        assert [hit["score"] for hit in found] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)


def test_ten_languages_find_what_they_name(model, indexes, tmp_path):
    (language, (text, _)), *more = SEARCHES.items()
    options = [word for code, (query, _) in more for word in ("-q", f"{code}={query}")]
    page = tmp_path / "page.html"
    found = hits(model, indexes / "hnsw", text, "--language", language, *options, "--html", page)
    assert [(one["language"], one["text"]) for one in found] == [(c, q) for c, (q, _) in SEARCHES.items()]
    right = [
        any(hit["id"] == expected for hit in one["hits"])
        for one, (_, expected) in zip(found, SEARCHES.values(), strict=True)
    ]
    assert right == [True] * len(SEARCHES)
    html = page.read_text(encoding="utf-8")
    assert html.count("<section>") == 10
    assert html.count('<img src="data:image/') == 50
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|<script""", html)
    assert '<h2 lang="ar"' in html
    assert 'dir="auto"' in html
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_python_interface_gives_the_commands_answers(model, indexes):
    with Encoder.open(model, threads=1) as encoder, VectorIndex.open(indexes / "flat") as index:
        found = index.search_texts(encoder, ["gato preto", "狗"], ["por_Latn", "zho_Hans"], k=3)
    assert [one[0].id for one in found] == ["🐈‍⬛", "🐕"]


@pytest.mark.parametrize("source", ["vectors", "flat"])
def test_another_models_vectors_are_refused_before_anything_is_embedded(
    exported, model, indexes, source, monkeypatch
):
    def embedding(*_, **__):
        raise AssertionError("nothing may be embedded")

    other = exported("capivara")
    monkeypatch.setattr(Encoder, "embed_texts", embedding)
    result = invoke("search", other, indexes / source, "gato")
    assert result.exit_code == 1
    fingerprints = [Encoder.open(one, verify=False).fingerprint for one in (model, other)]
    assert all(fingerprint in result.stderr for fingerprint in fingerprints)
    with (
        VectorIndex.open(indexes / "flat") as index,
        pytest.raises(InputError, match="space"),
    ):
        index.search_texts(Encoder.open(other, verify=False), ["gato"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{flat}", "{hnsw}", "gato"], "holds vectors, which cannot be searched together"),
        (["{flat}", "{gallery}", "gato"], "holds vectors, which cannot be searched together"),
        (["{flat}", "cachorro", "gato"], "cachorro does not exist. Only the last"),
        (["{flat}", "gato", "--dim", 128], "Leave --dim out"),
        (["{flat}", "gato", "--skip-bad"], "Leave --skip-bad out"),
        (["{flat}", "gato", "--effort", 4], "Leave effort out"),
        (["{vectors}", "gato", "--effort", 4], "Leave effort out"),
        (["{gallery}", "gato", "--effort", 4], "Leave effort out"),
        (["{flat}", "gato", "-q", "gato"], "expected LANGUAGE=TEXT"),
        (["{flat}", "gato", "-q", "xx=gato"], "'xx' is unknown"),
        (["{flat}", "gato", "--pictures", "{gallery}"], "Pass --html as well"),
        (["{flat}", "gato", "--html", "{page}", "--pictures", "{flat}"], "is not a source of images"),
        (["{flat}", "gato", "--html", "{page}", "--pictures", "nowhere"], "not a source of images"),
        (
            ["{flat}", "gato", "--html", "{page}", "--pictures", "{gallery}", "--id-column", "nothing"],
            "no column 'nothing'",
        ),
        (["{flat}", "gato", "--html", "nowhere/page.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_searched_is_an_error(model, indexes, tmp_path, arguments, message):
    places = {name: indexes / name for name in ("flat", "hnsw", "vectors")}
    places |= {"gallery": GALLERY, "page": tmp_path / "page.html"}
    filled = [str(argument).format(**places) for argument in arguments]
    result = invoke("search", model, *filled, "--language", "pt", "--threads", 1)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert not any(tmp_path.iterdir())


def test_the_summary_of_an_index_says_how_it_was_measured(vectors, tmp_path):
    out = tmp_path / "index"
    result = succeed("index", vectors, "-o", out, "--kind", "hnsw", "--threads", 1, "--effort", 40)
    assert re.search(
        r"recall@10 +against exact search, 191 queries \(held-out rows\), 1 thread\n", result.stdout
    )
    assert re.search(r"40 candidates: [01]\.\d{4}, .* ← default of searches", result.stdout)
    again = invoke("index", vectors, "-o", out)
    assert (again.exit_code, "Pass --replace" in again.stderr) == (1, True)
    record = json.loads(succeed("index", vectors, "-o", out, "--replace", "--json").stdout)
    assert record == json.loads((out / "index.json").read_text(encoding="utf-8"))


# --- pages and pictures -----------------------------------------------------------------------------------


def picture(size=(8, 8), kind="PNG", colour="red"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def answers(*ids, text="gato", language=None):
    found = Answer(Query(text, language), tuple(Hit(one, 0.5) for one in ids))
    return Answers((found,), Modality.IMAGE, "3 images, exactly", "", False)


def test_a_page_escapes_what_it_did_not_write():
    bad = """<script>alert('1')</script>"><img src=x onerror=alert(1)>"""
    page = page_from_answers(answers(bad, text=bad), {bad: picture()}, model=bad)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&quot;&gt;&lt;img") == 5
    assert page.count("<img ") == 1


def test_a_page_says_where_a_picture_is_missing_or_broken():
    page = page_from_answers(answers("a", "b", "c"), {"a": picture(), "b": b"broken"}, model="m")
    assert page.count('<img src="data:image/png;base64,') == 1
    assert "this picture cannot be shown" in page
    assert "no picture for this id" in page
    assert 'class="picture' not in page_from_answers(answers("a"), {}, model="m")


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    write_page(page, answers("a"), {}, model="one")
    before = page.read_bytes()

    def full_disk(self, text, encoding):
        self.write_bytes(b"<!doctype")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(page), "write_text", full_disk)
    with pytest.raises(InputError, match="No space left"):
        write_page(page, answers("b"), {}, model="two")
    assert page.read_bytes() == before
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize(("size", "kind", "start"), [((9, 9), "PNG", "png"), ((900, 700), "BMP", "jpeg")])
def test_large_pictures_become_thumbnails(size, kind, start):
    address = data_uri(picture(size, kind))
    assert address.startswith(f"data:image/{start};base64,")
    assert len(address) < 12_000


def test_a_transparent_picture_lies_on_white():
    file = io.BytesIO()
    Image.new("RGBA", (400, 400), (0, 0, 0, 0)).save(file, "TIFF")
    import base64

    shown = Image.open(io.BytesIO(base64.b64decode(data_uri(file.getvalue()).partition(",")[2])))
    assert shown.size == (320, 320)
    assert shown.getpixel((5, 5)) == (255, 255, 255)


def test_pictures_of_a_folder_are_found_by_their_paths_and_never_outside_it(tmp_path):
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "cat.png").write_bytes(b"cat")
    (tmp_path / "secret.png").write_bytes(b"secret")
    asked = ["below/cat.png", "../secret.png", str(tmp_path / "secret.png"), "nothing.png"]
    assert pictures_of_ids(folder, asked) == {"below/cat.png": b"cat"}
    assert pictures_of_gallery([folder], [str(folder / "below" / "cat.png")]) == {
        str(folder / "below" / "cat.png"): b"cat"
    }


@pytest.mark.parametrize(
    ("columns", "ids", "id_column", "expected"),
    [
        ({"id": ["x", "y", "z"]}, ["z", "x"], None, {"z": b"2", "x": b"0"}),
        ({"id": [7, 8, 9], "name": ["x", "y", "z"]}, ["8"], None, {"8": b"1"}),
        ({"id": [7, 8, 9], "name": ["x", "y", "z"]}, ["y"], None, {"y": b"1"}),
        ({"title": ["x", "y", "z"]}, ["y"], "title", {"y": b"1"}),
        ({"title": ["x", "y", "z"]}, ["1", "7"], None, {"1": b"1"}),
        ({"title": ["x", "y", "z"]}, ["y"], None, {}),
    ],
    ids=["names", "numbers", "second-column", "named-column", "row-numbers", "unknown"],
)
def test_pictures_of_a_table_are_found_by_their_ids(tmp_path, columns, ids, id_column, expected):
    path = tmp_path / "photos.parquet"
    table = pyarrow.table({**columns, "image": [b"0", b"1", b"2"]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert pictures_of_ids(path, ids, id_column=id_column) == expected


def test_texts_have_no_pictures_and_the_page_says_so(model, tmp_path):
    fingerprint = Encoder.open(model, verify=False).fingerprint
    path = write_shard(
        tmp_path / "part-00000.parquet", ["one", "two"], unit_vectors(2, 128), fingerprint=fingerprint
    )
    page = tmp_path / "page.html"
    result = succeed("search", model, path, "gato", "--language", "pt", "--html", page, "--threads", 1)
    assert "2 of 2 results have no image" in result.stderr
    assert "<img" not in page.read_text(encoding="utf-8")
