"""Lines of a parity report, as exports print them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.cosines import nan_first

if TYPE_CHECKING:
    from export.parity.gate import RetrievalFigures
    from export.parity.measure import Agreement, ParityReport

__all__ = ["parity_lines"]


def parity_lines(report: ParityReport) -> Iterator[str]:
    """Yield the indented lines of a parity report."""
    yield f"  reference  {report.reference}"
    yield (
        f"  compared   {report.n_texts} texts, {report.n_images} images; token ids equal; "
        f"pixels within {report.max_pixel_error * 255:.2f}/255"
    )
    for engine, figures in report.engines.items():
        language, worst = min(figures.languages.items(), key=lambda item: nan_first(item[1].min_cosine))
        yield f"  {engine}"
        yield f"    text       {_agreement(figures.text)}"
        yield f"    image      {_agreement(figures.image)}"
        yield f"    languages  {len(figures.languages)}; worst {language} at cosine {worst.min_cosine:.8f}"
        yield f"    alone      a text alone and in a batch differ by ≤ {figures.row_alone:.1e}"
        if engine in report.retrieval:
            yield from _retrieval_lines(report.retrieval[engine])


def _retrieval_lines(found: RetrievalFigures) -> Iterator[str]:
    from export.retrieval.comparison import Direction

    for direction in Direction:
        reference, exported = found.mean_recall_at_1(direction)
        worst = found.worst_language(direction)
        title = "text→image" if direction is Direction.TEXT_TO_IMAGE else "image→text"
        yield (
            f"    {title} R@1 {100 * reference:.2f} → {100 * exported:.2f}, mean of {len(found.languages)} "
            f"languages; worst {worst.code}: {-100 * worst.comparison(direction).drop(1):+.2f} points"
        )


def _agreement(measured: Agreement) -> str:
    return f"cosine ≥ {measured.min_cosine:.8f}, error ≤ {measured.max_abs_error:.1e}"
