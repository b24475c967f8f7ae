"""``babeltower search``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.commands.options import (
    AsJson,
    ca_file_option,
    cache_option,
    connection_to_model,
    device_option,
    json_text,
    plain_json,
    token_file_option,
)
from runtime.errors import InputError
from runtime.manifest import Engine, Modality, Precision

__all__ = ["search"]

_PAGE, _TOWER = "Page of pictures", "Text tower"
_SERVER = "Server, if the model is an address"


def search(
    model: Annotated[str, typer.Argument(metavar="REPOSITORY/NAME", help="An exported model.")],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... TEXT",
            help="An index or a folder of vectors; or image files, image folders, Parquet files of images. "
            "Last the query: a text, or an image file to search by.",
        ),
    ],
    language: Annotated[str | None, typer.Option(help="Language of TEXT: por_Latn, pt-BR, ...")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--query", "-q", metavar="LANGUAGE=TEXT", help="Further query; may be repeated."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="Search by a picture in place of TEXT; each --query is then added to the picture.",
        ),
    ] = None,
    like_weight: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the picture beside a --query.")
    ] = 0.5,
    literal: Annotated[
        bool,
        typer.Option("--literal", help="Search for TEXT as a text, also if it looks like an image file."),
    ] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            "-w",
            metavar="COLUMN=VALUE",
            help="Only rows whose kept column meets this; also !=, <, <=, >, >=. Quotes keep blanks: "
            "c=' x '. May be repeated.",
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Results per query.")] = 5,
    effort: Annotated[
        int | None, typer.Option(min=1, help="Lists or candidates per search; default: as measured at build.")
    ] = None,
    dim: Annotated[int | None, typer.Option(help="Vector width for images; default: full.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip images that cannot be decoded, and report them.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(rich_help_panel=_PAGE, help="Write an HTML page of the images found.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_PAGE,
            help="Folder, Parquet file or tars of the images; default: the recorded source of the vectors.",
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Print the texts of the hits, read from the source of their vectors."
        ),
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of --texts that was embedded.")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of --pictures or --texts that holds the ids.")
    ] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(
            rich_help_panel=_TOWER, envvar="BABELTOWER_ENGINE", help="Default: onnxruntime, or cuda on a GPU."
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(rich_help_panel=_TOWER, envvar="BABELTOWER_PRECISION", help="Default: fp32."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_TOWER, envvar="BABELTOWER_THREADS", help="Default: every physical core."
        ),
    ] = None,
    device: Annotated[str | None, device_option(_TOWER)] = None,
    cache: Annotated[Path | None, cache_option(_TOWER)] = None,
    token_file: Annotated[Path | None, token_file_option(_SERVER, "sent with every request")] = None,
    ca_file: Annotated[Path | None, ca_file_option(_SERVER)] = None,
    as_json: AsJson = False,
) -> None:
    """Find the images or other embedded items that best match a text, a picture, or both.

    Vectors of another model are rejected before the search.
    """
    from runtime.encoder import Encoder
    from runtime.indexes.conditions import Condition
    from runtime.search.answers import answers_from_sources

    if html is None and (pictures is not None or (id_column is not None and texts is None)):
        raise InputError("--pictures and --id-column need --html, the page of images. Pass --html as well.")
    if text_column is not None and texts is None:
        raise InputError("--text-column is a column of --texts. Pass --texts SOURCE as well.")
    conditions = [Condition.parse(text) for text in where or []]
    places, queries = _queries(sources, more or [], language, like=like, weight=like_weight, literal=literal)
    with Encoder.open(
        model,
        engine=engine,
        precision=precision,
        threads=threads,
        cache=cache,
        device=device,
        connection=connection_to_model(model, token_file, ca_file),
    ) as encoder:
        answers = answers_from_sources(
            encoder,
            places,
            queries,
            k=k,
            dim=dim,
            effort=effort,
            threads=threads,
            skip_bad=skip_bad,
            where=conditions,
        )
    for problem in answers.skipped:
        typer.echo(f"skipped: {problem}", err=True)
    said = {} if texts is None else _texts_of_hits(answers, texts, text_column, id_column)
    if html is not None:
        _write_page(html, answers, places, pictures, id_column, said, model=encoder.name)
    typer.echo(json_text(_as_json(answers, said)) if as_json else _as_text(answers, said))


def _texts_of_hits(
    answers: Any, source: str, text_column: str | None, id_column: str | None
) -> dict[str, str]:
    """Read the texts of the hits from the source they were embedded from."""
    from runtime.corpus.lookup import items_of_ids
    from runtime.corpus.rows import Columns
    from runtime.corpus.sources import open_source

    if answers.modality is not Modality.TEXT:
        raise InputError("--texts needs vectors of texts, but images were searched. See --pictures.")
    opened = open_source(source, columns=Columns(id=id_column, text=text_column))
    if opened.modality is not Modality.TEXT:
        raise InputError(f"{source} holds images, but --texts needs texts. Pass --text-column.")
    ids = {hit.id for answer in answers.answers for hit in answer.hits}
    found: dict[str, str] = items_of_ids(opened, ids)
    if ids and not found:
        raise InputError(
            f"{source} has none of the {len(ids)} texts found, such as {min(ids)!r}. Pass the source of the "
            "vectors, with the --id-column it was embedded with."
        )
    return found


def _queries(
    arguments: list[str],
    more: list[str],
    language: str | None,
    *,
    like: Path | None,
    weight: float,
    literal: bool,
) -> tuple[list[Path], list[Any]]:
    """Split the arguments into sources and queries."""
    from runtime.search.answers import Query

    further = [_query(one, language) for one in more]
    if like is not None:
        _require_picture(like)
        sources = [_place(argument) for argument in arguments]
        if len(sources) > 1 and not sources[-1].exists():
            raise InputError(
                f"{arguments[-1]} is no source. With --like, a text is passed as --query LANGUAGE=TEXT."
            )
        if not further:
            return sources, [Query("", None, like)]
        return sources, [Query(one.text, one.language, like, weight) for one in further]
    if len(arguments) < 2:
        raise InputError("The query is missing. Pass a text or an image file last, or --like PICTURE.")
    text = arguments[-1]
    sources = [_place(argument) for argument in arguments[:-1]]
    if not text.strip():
        raise InputError("The query is empty. Pass a text or an image file last, or --like PICTURE.")
    if not literal and _has_suffix_of_picture(text):
        if not _is_file(text):
            raise InputError(
                f"There is no image file {text}. Pass one that exists; or --literal to search for this text."
            )
        typer.echo(f"searching by the picture {text}; --literal searches for the text instead", err=True)
        return sources, [Query("", None, Path(text)), *further]
    return sources, [Query(text, language), *further]


def _place(argument: str) -> Path:
    """Return the path of a source."""
    if "://" in argument:
        raise InputError(
            f"{argument} is a URL; search reads folders and files of this machine. Copy it here first."
        )
    return Path(argument)


def _has_suffix_of_picture(text: str) -> bool:
    from runtime.preprocessing.image_formats import IMAGE_SUFFIXES

    return Path(text).suffix.lower() in IMAGE_SUFFIXES


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name
        return False


def _require_picture(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"The picture {path} does not exist. Pass an image file with --like.")


def _query(text: str, language: str | None) -> Any:
    from runtime.search.answers import Query

    code, equals, words = text.partition("=")
    if not equals or not words.strip():
        raise InputError(
            f"Invalid --query {text!r}; expected LANGUAGE=TEXT, such as 'por_Latn=gato preto', or "
            "'=gato preto' for the language of --language."
        )
    return Query(words, code or language)


def _write_page(
    html: Path,
    answers: Any,
    sources: list[Path],
    pictures: Path | None,
    id_column: str | None,
    texts: dict[str, str],
    *,
    model: str,
) -> None:
    from runtime.search.page import write_page
    from runtime.search.pictures import pictures_of_gallery, pictures_of_ids

    ids = {hit.id for answer in answers.answers for hit in answer.hits}
    recorded = Path(answers.source) if answers.source and answers.modality is Modality.IMAGE else None
    if answers.is_gallery and pictures is None:
        found = pictures_of_gallery(sources, ids)
    elif pictures is not None:
        found = pictures_of_ids(pictures, ids, id_column=id_column)
        if not found:
            raise InputError(
                f"{pictures} has none of the {len(ids)} images found, such as {min(ids)!r}. "
                "Pass the source of the vectors, and --id-column if its ids have their own column."
            )
    elif recorded is not None and recorded.exists():
        typer.echo(f"images from {recorded}, the recorded source of the vectors", err=True)
        found = pictures_of_ids(recorded, ids, id_column=id_column)
    else:
        found = {}
    if len(found) < len(ids) and not texts:
        typer.echo(f"{len(ids) - len(found)} of {len(ids)} results have no image; see --pictures", err=True)
    write_page(html, answers, found, model=model, texts=texts)
    typer.echo(f"wrote {html}", err=True)


def _as_json(answers: Any, texts: dict[str, str]) -> Any:
    name = "image" if answers.is_gallery else "id"
    found = [
        [
            {
                name: hit.id if hit.number is None else hit.number,
                "score": hit.score,
                **({"text": texts.get(hit.id)} if texts else {}),
                **({"kept": plain_json(dict(hit.kept))} if hit.kept else {}),
            }
            for hit in answer.hits
        ]
        for answer in answers.answers
    ]
    if len(found) == 1:
        return found[0]
    return [
        {
            "text": answer.query.text,
            "language": answer.query.language,
            **({"picture": str(answer.query.picture)} if answer.query.picture else {}),
            "hits": hits,
        }
        for answer, hits in zip(answers.answers, found, strict=True)
    ]


def _as_text(answers: Any, texts: dict[str, str]) -> str:
    def line(hit: Any) -> str:
        said = f"  {' '.join(texts[hit.id].split())}" if hit.id in texts else ""
        kept = "".join(f"  {name}={value}" for name, value in hit.kept.items())
        return f"{hit.score:.4f}  {hit.id}{said}{kept}"

    blocks = ["\n".join(map(line, answer.hits)) for answer in answers.answers]
    if len(blocks) == 1:
        return blocks[0]
    queries = [answer.query for answer in answers.answers]
    heads = [f"{one.title} ({one.language})" if one.language else one.title for one in queries]
    return "\n\n".join(f"{head}\n{block}" for head, block in zip(heads, blocks, strict=True))
