"""Pages of ``--layout web`` for tests: written beside a repository, served, and opened in Chromium."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from immich_exports import form_of
from sample_models import CHECKPOINTS, ROOT

from bench.timing.web_page import served_folder
from export.checkpoint import towers_from_checkpoint
from export.layouts.layout import LayoutRequest
from export.layouts.web.gallery import GallerySource
from export.layouts.web.layout import WebOptions, web_layout
from export.layouts.web.packages import PACKAGES
from export.precision.calibration import CalibrationSize
from export.repository import ExportOptions, drafted
from export.towers import Towers
from export.vocabulary.pruned_towers import pruned_towers
from export.vocabulary.selection import VocabularyOptions
from runtime.errors import ExportError
from runtime.manifest import Modality, Precision
from runtime.repository import publish

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
NODE = shutil.which("node")
NPM = shutil.which("npm")

needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no browser here")


@cache
def npm_packages() -> Path:
    """Folder of the JavaScript libraries: ``BABELTOWER_NPM_PACKAGES``, or ``build/npm``, fetched once."""
    named = os.environ.get("BABELTOWER_NPM_PACKAGES")
    if named:
        return Path(named)
    folder = ROOT / "build" / "npm"
    missing = [package.wanted for package in PACKAGES if not (folder / package.tarball).is_file()]
    if missing and NPM is None:
        pytest.skip("npm is not installed, and BABELTOWER_NPM_PACKAGES names no folder")
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([str(NPM), "pack", "--silent", *missing], cwd=folder, check=True, capture_output=True)
    return folder


@cache
def towers_of(sample: str, languages: str = "") -> Towers:
    base = CHECKPOINTS / "capivara" if sample.endswith("-lora") else None
    towers = towers_from_checkpoint(CHECKPOINTS / sample, base=base)
    return pruned_towers(towers, VocabularyOptions(tuple(languages.split(",")))) if languages else towers


def write_page(
    towers: Towers,
    work: Path,
    *,
    name: str = "page",
    precision: Precision = Precision.INT8,
    gallery: GallerySource | None = None,
) -> tuple[Path, Path]:
    """Write a draft, not measured, as a page and as a repository; return the page and the model."""
    layout = web_layout(WebOptions(gallery, npm_packages()))
    place = layout.place(towers, name)
    size = CalibrationSize(n_texts=64, n_images=16)
    options = ExportOptions(forms=(form_of(precision),), calibration_size=size, threads=1)
    repository, folder = work / "repository", work / "site" / place.folder
    folder.mkdir(parents=True)
    with drafted(towers, repository, name=name, options=options, measured=False) as draft:
        graphs = {modality: draft.graph(modality) for modality in Modality}
        layout.write(LayoutRequest(towers, graphs, place, folder, precision, 1))
        publish(draft.stage, repository, draft.manifest, draft.variant)
    return folder, repository / name


def change_site(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``site.json``."""
    path = folder / "site.json"
    site = json.loads(path.read_text(encoding="utf-8"))
    change(site)
    path.write_text(json.dumps(site), encoding="utf-8")


def replace_asset(folder: Path, asset: str, data: bytes) -> None:
    """Replace an asset by other bytes, with the checksum that belongs to them."""

    def change(site: dict[str, Any]) -> None:
        path = site["assets"][asset]["parts"][0]["path"]
        (folder / path).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        part = {"path": path, "bytes": len(data), "sha256": digest}
        site["assets"][asset] = {"bytes": len(data), "compressed": False, "parts": [part]}

    change_site(folder, change)


def run_node(page: Path, script: str, inputs: Mapping[str, Any], work: Path) -> Any:
    """Run a module beside a copy of the page's modules; it reads ``inputs`` and prints one JSON value."""
    modules = work / "modules"
    if not modules.is_dir():
        modules.mkdir(parents=True)
        (modules / "package.json").write_text('{"type": "module"}')
        for file in page.glob("*.js"):
            shutil.copyfile(file, modules / file.name)
        shutil.copytree(page / "vendor", modules / "vendor")
    (modules / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    (modules / "script.js").write_text(script, encoding="utf-8")
    command = [str(NODE), "--max-old-space-size=4096", "script.js"]
    done = subprocess.run(command, cwd=modules, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return json.loads(done.stdout)


@contextmanager
def opened_page(
    browser: Browser,
    folder: Path,
    *,
    path: str = "/",
    prepare: str = "",
    fragment: str = "",
    headers: Mapping[str, str] | None = None,
) -> Iterator[Page]:
    """Serve a folder, and open a page in it; ``prepare`` runs before the page's own scripts."""
    with served_folder(folder, headers) as served:
        page = browser.new_page()
        page.set_default_timeout(120_000)
        if prepare:
            page.add_init_script(prepare)
        try:
            page.goto(f"{served.address}{path}{fragment}")
            yield page
        finally:
            page.close()


def wait_until_ready(page: Page) -> None:
    page.wait_for_selector("body[data-state]")
    assert page.get_attribute("body", "data-state") == "ready", page.inner_text("#failure-text")


ASK = """
async (rows) => {
  const found = [];
  const settled = (number) => new Promise((resolve) => {
    const look = () => document.body.dataset.settled === String(number) && (observer.disconnect(), resolve());
    const observer = new MutationObserver(look);
    observer.observe(document.body, { attributes: true });
    look();
  });
  let number = Number(document.body.dataset.settled ?? 0);
  for (const [text, language] of rows) {
    const chooser = document.getElementById("language-field");
    if (!chooser.hidden) document.getElementById("language").value = language;
    document.getElementById("text").value = text;
    document.getElementById("ask").requestSubmit();
    number += 1;
    await settled(number);
    const { vector, hits, ids } = window.babeltower.answer ?? {};
    const notes = [...document.querySelectorAll("#notes p")].map((note) => note.textContent);
    found.push({ vector: vector && [...vector], hits, ids, notes });
  }
  return found;
}
"""
"""Script that types each text into the form, and returns what the page answered."""


def ask(page: Page, rows: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Ask the page by its form; one answer a text."""
    found: list[dict[str, Any]] = page.evaluate(ASK, rows)
    return found


def captions_of(language: str) -> list[str]:
    """Names of all sample drawings in a language."""
    from samples.dataset import load_captions

    return [caption.text for caption in load_captions(language)]


def require_export_error(error: ExportError, *parts: str) -> None:
    for part in parts:
        assert part in str(error)
