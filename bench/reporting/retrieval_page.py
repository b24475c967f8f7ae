"""Report as one self-contained HTML page: no network, light and dark, wide and narrow."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.accuracy.published_figures import published_figures
from bench.accuracy.retrieval_report import Evaluation
from bench.accuracy.searches import Search, turned_searches
from bench.reporting.chart import dot_columns
from export.retrieval.comparison import Direction
from export.retrieval.metrics import KS
from runtime.preprocessing.image import decode
from runtime.preprocessing.image_formats import open_image
from runtime.preprocessing.languages import english_name, languages

__all__ = ["page_from_evaluation", "pictures_of", "write_page"]

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_THUMBNAIL_PX = 160
_INLINE_BYTES = 8_192
"""Images up to this size are inlined unchanged; larger ones become JPEG thumbnails."""


def write_page(path: Path, evaluation: Evaluation, searches: Sequence[Search]) -> None:
    """Write the page; the folder must exist."""
    path.write_text(page_from_evaluation(evaluation, searches), encoding="utf-8")


def page_from_evaluation(evaluation: Evaluation, searches: Sequence[Search]) -> str:
    """Render the page.

    Args:
        searches: From ``bench.accuracy.searches``, shown first and in this order.

    Returns:
        HTML with inline styles, pictures and the script that sorts the table.
    """
    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["percent"] = lambda share: f"{100 * share:.1f}"
    templates.filters["language_name"] = english_name
    templates.filters["tag"] = _bcp47_tag
    report = evaluation.report
    rows = report.worst_first()
    return templates.get_template("page.html.j2").render(
        report=report,
        rows=rows,
        columns=dot_columns(rows),
        searches=searches,
        turned=turned_searches(evaluation),
        picture=pictures_of(evaluation),
        published=published_figures(report.dataset, report.model, report.notes),
        credit=evaluation.dataset.credit,
        directions=list(Direction),
        ks=KS,
    )


def pictures_of(evaluation: Evaluation) -> Callable[[int], str]:
    """Return a function from a picture's index to its data URI; large ones become thumbnails."""

    @cache
    def picture(index: int) -> str:
        return _data_uri(evaluation.dataset.images[index].read())

    return picture


def _data_uri(data: bytes) -> str:
    kind = (open_image(data, name="of the page").format or "").lower()
    if len(data) > _INLINE_BYTES or kind not in ("png", "jpeg", "gif", "webp"):
        data, kind = _thumbnail(data), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _thumbnail(data: bytes) -> bytes:
    image = decode(data, name="of the page").convert("RGB")
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return file.getvalue()


def _bcp47_tag(flores: str) -> str:
    return next((row.bcp47 for row in languages() if row.flores == flores), "und")
