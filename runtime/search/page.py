"""Self-contained HTML page of answers with pictures: no network, no scripts, light and dark themes."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from runtime.errors import InputError
from runtime.indexes.exact import Hit
from runtime.preprocessing.languages import languages_from_codes
from runtime.search.answers import Answer, Answers
from runtime.search.pictures import data_uri
from runtime.storage import replace_text

__all__ = ["page_from_answers", "write_page"]

_STYLE = """
:root { --ground: #fbfaf8; --card: #fff; --ink: #1d1c1a; --quiet: #6a6660; --line: #e4e0d9; --mark: #9a3412; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161514; --card: #211f1d; --ink: #ece9e4; --quiet: #a19b92; --line: #37332f; --mark:
  #fdba74; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
header, section { margin-bottom: 2.25rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere; text-align: left; }
p { margin: 0; }
.mark { color: var(--mark); font-size: .8rem; font-weight: 600; letter-spacing: .08em; }
.quiet { color: var(--quiet); font-size: .875rem; overflow-wrap: anywhere; }
ol { list-style: none; margin: .75rem 0 0; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
.picture { aspect-ratio: 1; background: #fff; display: grid; place-items: center; padding: .5rem; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.none { background: var(--ground); color: var(--quiet); font-size: .8rem; padding: .5rem;
  text-align: center; }
.text { padding: .6rem .6rem 0; overflow-wrap: anywhere; }
.what { padding: .4rem .6rem .5rem; font-size: .8rem; }
.what b { display: block; font-weight: 600; overflow-wrap: anywhere; }
.what span { color: var(--quiet); font-variant-numeric: tabular-nums; }
@media (max-width: 30rem) { ol { grid-template-columns: repeat(2, 1fr); } }
"""


def write_page(
    path: Path,
    answers: Answers,
    pictures: Mapping[str, bytes],
    *,
    model: str,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write the page atomically.

    Raises:
        InputError: the file cannot be written.
    """
    page = page_from_answers(answers, pictures, model=model, texts=texts)
    try:
        replace_text(path, page.encode("utf-8", "backslashreplace").decode())  # names may not be UTF-8
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}).") from error


def page_from_answers(
    answers: Answers, pictures: Mapping[str, bytes], *, model: str, texts: Mapping[str, str] | None = None
) -> str:
    """Render the page as HTML.

    Args:
        pictures: Encoded images by hit id; if empty, only ids are shown.
        model: Name of the model, for the page header.
        texts: Texts of the hits by id, if texts were searched.
    """
    n = len(answers.answers)
    title = answers.answers[0].query.title if n == 1 else f"{n} searches"
    sections = "\n".join(_section(answer, pictures, texts or {}) for answer in answers.answers)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · babeltower</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="mark">babeltower</p>
<h1>{"A search" if n == 1 else f"{n} searches"}</h1>
<p class="quiet">{escape(model)}: {escape(answers.searched)}. Hits show id, rank and score.</p> </header>
{sections}
</main>
</body>
</html>
"""


def _section(answer: Answer, pictures: Mapping[str, bytes], texts: Mapping[str, str]) -> str:
    query = answer.query
    tag, name = _language(query.language)
    cards = "\n".join(_card(rank, hit, pictures, texts) for rank, hit in enumerate(answer.hits, 1))
    return f"""<section>
<h2{f' lang="{escape(tag)}"' if tag else ""} dir="auto">{escape(query.title)}</h2>
{f'<p class="quiet">{escape(name)}</p>' if name else ""}
<ol>
{cards}
</ol>
</section>"""


def _card(rank: int, hit: Hit, pictures: Mapping[str, bytes], texts: Mapping[str, str]) -> str:
    shown = ""
    if pictures:
        shown = _picture(hit, pictures.get(hit.id))
    elif hit.id in texts:
        shown = f'<p class="text" dir="auto">{escape(texts[hit.id])}</p>'
    return (
        f'<li>{shown}<div class="what"><b dir="auto">{escape(hit.id)}</b>'
        f"<span>{rank} · {hit.score:.3f}</span></div></li>"
    )


def _picture(hit: Hit, data: bytes | None) -> str:
    if data is None:
        return '<div class="picture none">no picture for this id</div>'
    try:
        address = data_uri(data)
    except (OSError, ValueError, SyntaxError):  # Pillow's errors for invalid files
        return '<div class="picture none">this picture cannot be shown</div>'
    return f'<div class="picture"><img src="{address}" alt="{escape(hit.id)}" loading="lazy"></div>'


def _language(code: str | None) -> tuple[str, str]:
    """Return a language's BCP-47 tag and English name; both empty if there is none."""
    if code is None:
        return "", ""
    (row,) = languages_from_codes([code])
    return row.bcp47, f"{row.name} ({code})"
