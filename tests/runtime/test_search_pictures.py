"""Searching by a picture, and by a picture and a text together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_models import ROOT, Exported
from typer.testing import CliRunner

from runtime.commands.app import app
from samples import dataset

GALLERY = ROOT / "samples" / "emoji" / "gallery.parquet"


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "query.png"
    (drawing,) = [one for one in dataset.load_gallery() if one.emoji == "🐕"]
    path.write_bytes(drawing.png)
    return path


def search(*arguments: object):
    return CliRunner().invoke(app, ["search", *map(str, arguments), "--threads", "1", "--json"])


def test_an_image_file_as_the_query_is_searched_by(model, picture):
    result = search(model, GALLERY, picture, "-k", 3)
    assert result.exit_code == 0, result.output
    assert f"searching by the picture {picture}; --literal searches for the text" in result.stderr
    found = json.loads(result.stdout)
    assert found[0]["image"] == "🐕"
    assert found[0]["score"] == pytest.approx(1, abs=1e-4)
    literal = search(model, GALLERY, picture, "--literal", "--language", "por_Latn", "-k", 3)
    assert literal.exit_code == 0, literal.output
    assert json.loads(literal.stdout)[0]["score"] < 0.99


def test_a_picture_and_a_text_together(model, picture):
    alone = json.loads(search(model, GALLERY, "--like", picture, "-k", 5_000).stdout)
    text = json.loads(search(model, GALLERY, "gato preto", "--language", "por_Latn", "-k", 40).stdout)
    both = search(model, GALLERY, "--like", picture, "-q", "por_Latn=gato preto", "-k", 5_000)
    assert both.exit_code == 0, both.output
    rank = {hit["image"]: place for place, hit in enumerate(json.loads(both.stdout))}
    assert alone[0]["image"] == "🐕"
    assert rank["🐕"] < 10
    before = {hit["image"]: place for place, hit in enumerate(alone)}
    assert sum(rank[hit["image"]] < before[hit["image"]] for hit in text[:10]) > 7
    words = ["-q", "por_Latn=gato preto", "--like-weight", 0]
    weighed = search(model, GALLERY, "--like", picture, *words, "-k", 5)
    assert [hit["image"] for hit in json.loads(weighed.stdout)] == [hit["image"] for hit in text[:5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "nowhere.png"], "The picture nowhere.png does not exist"),
        ([], "The query is missing"),
        (["gato", "--like", ROOT / "pyproject.toml"], "With --like, a text is passed as --query"),
    ],
)
def test_a_query_that_is_none_says_how_to_ask(model, arguments, message):
    result = search(model, GALLERY, *arguments)
    assert result.exit_code == 1
    assert message in result.output
