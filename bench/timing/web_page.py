"""A page of ``--layout web``, served from its folder and opened in Chromium: bytes, loading, queries."""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import BabeltowerError
from runtime.extras import needing

__all__ = ["PageFigures", "ServedFolder", "figures_of_page", "opened_chromium", "served_folder"]


@dataclass(frozen=True, slots=True)
class PageFigures:
    """Figures of one page in one tab.

    Attributes:
        fetched_bytes: Bytes that the host sent until the page was ready.
        ready_s: Seconds from the address to the first possible query, from a host on this machine.
        open_ms: Opening of tokenizer, gallery and model.
        check_ms: Check of the probes.
        query_ms: Median of a query, its embedding and search.
        lowest_cosine: Lowest cosine of a probe with the exported model.
    """

    fetched_bytes: int
    ready_s: float
    open_ms: float
    check_ms: float
    query_ms: float
    lowest_cosine: float


@dataclass(slots=True)
class ServedFolder:
    """Address of a served folder, without a slash at the end, and the bytes of files sent so far."""

    address: str
    sent_bytes: int = 0


@contextmanager
def served_folder(folder: Path, headers: Mapping[str, str] | None = None) -> Iterator[ServedFolder]:
    """Serve a folder as ``python -m http.server`` does, with further headers."""
    served = ServedFolder("")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: Any) -> None:
            """Log nothing."""

        def end_headers(self) -> None:
            """Send the further headers with the others."""
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            """Send a file and count its bytes; a tab that is closed meanwhile is no error."""
            try:
                super().copyfile(source, outputfile)
                served.sent_bytes += source.tell()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def opened_chromium() -> Iterator[Any]:
    """Start Chromium without a window, and yield Playwright's browser.

    Raises:
        BabeltowerError: Chromium is not installed.
        MissingPackageError: Playwright is not installed.
    """
    found = shutil.which("chromium")
    if found is None:
        raise BabeltowerError("Chromium is not installed, which the page is opened in. Install it.")
    with needing("Opening a page", "playwright"):
        from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def figures_of_page(
    browser: Any, folder: Path, texts: Sequence[str], *, timeout_s: float = 600.0
) -> PageFigures:
    """Open a page in a tab and ask it texts.

    Args:
        browser: Playwright's browser.
        timeout_s: Seconds after which a page that does not answer is given up.

    Raises:
        BabeltowerError: the page says that it cannot answer here.
    """
    with served_folder(folder) as served, contextlib.closing(browser.new_page()) as page:
        page.set_default_timeout(timeout_s * 1_000)
        started = time.perf_counter()
        page.goto(f"{served.address}/")
        page.wait_for_selector("body[data-state]")
        ready_s = time.perf_counter() - started
        said = page.evaluate("({...document.body.dataset})")
        if said["state"] != "ready":
            raise BabeltowerError(f"{folder} does not answer: {page.inner_text('#failure-text')}")
        fetched_bytes = served.sent_bytes
        times = [_ask(page, text, number) for number, text in enumerate(texts, start=1)]
    return PageFigures(
        fetched_bytes=fetched_bytes,
        ready_s=ready_s,
        open_ms=float(said["openMs"]),
        check_ms=float(said["checkMs"]),
        query_ms=statistics.median(times),
        lowest_cosine=float(said["lowest"]),
    )


def _ask(page: Any, text: str, number: int) -> float:
    page.fill("#text", text)
    page.click("#go")
    page.wait_for_selector(f"body[data-answered='{number}']")
    spent = page.evaluate("window.babeltower.answer.milliseconds")
    return float(spent["embed"] + spent["search"])
