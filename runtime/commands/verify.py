"""``babeltower verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from runtime.commands.options import AsJson, json_text
from runtime.errors import DamagedVectorsError, UnfinishedRunError

__all__ = ["verify"]

_MOST_SHOWN = 20


def verify(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Folder or URL of vectors, or a folder of an index.")
    ],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a folder of vectors or an index, and compare it with what was written.

    The exit code is 0 if all is well, 65 if a file is missing, changed or of no part, and 75 if nothing is
    wrong but the run is not finished.
    """
    from runtime.corpus.folder.inspection import check_of_folder
    from runtime.corpus.stores import store_from_location
    from runtime.indexes.record import RECORD_FILE, IndexRecord

    if "://" not in folder and (Path(folder) / RECORD_FILE).is_file():
        record = IndexRecord.read(Path(folder))
        record.require_unchanged(Path(folder))
        typer.echo(f"{folder}: {record.n_rows:,} rows, {record.size_bytes:,} bytes, as written")
        return
    check = check_of_folder(store_from_location(folder))
    if as_json:
        typer.echo(json_text(asdict(check)))
    else:
        typer.echo(
            f"{check.location}: {check.files:,} files of {check.rows:,} rows, {check.n_bytes / 1e6:,.1f} MB "
            f"read in {check.seconds:.1f} s; {len(check.problems):,} problems"
        )
        for problem in check.problems[:_MOST_SHOWN]:
            typer.echo(f"  {problem}")
    if check.problems:
        raise DamagedVectorsError(
            f"{check.problems[0]}. Remove changed files and run the same babeltower embed command again, "
            "which writes lost parts anew; move files away that are not its own."
        )
    if not check.is_finished:
        raise UnfinishedRunError(
            f"The embedding run of {check.location} is not finished. Run the same babeltower embed command "
            "again to resume it."
        )
