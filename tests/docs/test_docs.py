"""The documentation: its code runs, its site builds without a warning, and needs no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from document_blocks import blocks_of, commands_of, make_targets, run_command, run_python
from sample_models import ROOT, Exported

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "decisions")
LANGUAGES = {"bash", "python", "console", "text", "yaml", "json"}


SERVED = {"http.md"}
"""Pages whose examples need a server: ``tests/gateway/test_page.py`` runs them."""


def runnable(page: Path) -> bool:
    return page.name not in SERVED and any(block.language in ("bash", "python") for block in blocks_of(page))


def exports(page: Path) -> bool:
    commands = [c for block in blocks_of(page) if block.language == "bash" for c in commands_of(block)]
    return any(command.startswith("babeltower export ") for command in commands)


def enter(folder: Path, model: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where the samples are and, if it is given, a model: as a reader of the page does."""
    (folder / "samples").symlink_to(ROOT / "samples")
    (folder / "models").mkdir()
    for entry in model.parent.iterdir() if model else ():
        if entry.is_dir() and entry.name.startswith(f"{model.name}_"):
            shutil.copytree(entry, folder / "models" / entry.name)
        elif entry.name.startswith(f"{model.name}."):
            shutil.copy(entry, folder / "models")
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: p.relative_to(DOCS).stem)
def test_the_code_of_a_page_runs(
    page: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path, None if exports(page) else exported("capivara"), monkeypatch)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks_of(page):
        if block.language == "python":
            run_python(block, page, names)
        elif block.language == "bash":
            for command in commands_of(block):
                run_command(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(DOCS).stem)
def test_blocks_say_whether_they_are_run(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, (page, block.line)
        if block.language == "console":
            for command in commands_of(block):
                assert command.startswith("$ "), (page, block.line, command)


def test_targets_that_pages_name_exist() -> None:
    for page in PAGES:
        named = re.findall(r"(?:`|\$ |^ +)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= set(make_targets()), page


def test_modules_that_pages_name_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"python -m (bench(?:\.\w+)+)", text):
            path = ROOT.joinpath(*name.split("."))
            assert path.with_suffix(".py").is_file() or path.is_dir(), (page, name)
        for name in re.findall(r"`((?:bench|export|runtime|tests)/[\w/]+\.(?:py|json|csv|md))`", text):
            assert "NAME" in name or (ROOT / name).is_file(), (page, name)


class Fetched(HTMLParser):
    """What a browser would fetch when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.addresses.append(given.get("href") or "")
        self.addresses += [given[name] or "" for name in ("src", "srcset", "poster") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a warning is an error."""
    pytest.importorskip("material", reason="the site is built by mkdocs-material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix(".html")
        assert (site / (name.with_stem("index") if name.stem == "README" else name)).is_file(), page


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        found = Fetched()
        found.feed(page.read_text(encoding="utf-8"))
        assert found.addresses
        assert not [a for a in found.addresses if a.startswith(("http:", "https:", "//"))], page
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", text), style


def test_the_api_page_describes_the_encoder(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for anchor in ("runtime.encoder.Encoder.embed_texts", "runtime.zeroshot.Classifier.classify", "towers"):
        assert f'id="{anchor}"' in text
    assert "L2-normalised, in input order" in text
