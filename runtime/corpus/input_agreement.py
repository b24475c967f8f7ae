"""Agreement of a resumed run with what its finished parts were read from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from runtime.corpus.folder.kept import KeptColumns
from runtime.corpus.input_record import InputRecord, is_read_once
from runtime.corpus.job import Job, finished_parts_read_again, more_or_fewer_rows, require_content
from runtime.corpus.journal import Journal, PartRecord, SourceChange, files_of_part
from runtime.corpus.pictures import MISSING_FOLDER
from runtime.corpus.rows import Columns
from runtime.corpus.stores import Store
from runtime.errors import CorpusError
from runtime.extras import parquet, pyarrow

__all__ = ["agree_on_input", "remedy_of_kinds", "require_same_stream"]


def agree_on_input(job: Job, journal: Journal, record: InputRecord, arguments: Mapping[str, Any]) -> None:
    """Reopen the parts that are to be embedded again, and record the arguments and the files.

    A changed source is taken up in an order that lets a kill in between lose nothing: parts whose rows
    changed are reopened before the journal has the source's new identity, and the list of files follows last.
    Until then every command without ``--recheck-input`` is refused.

    Raises:
        ChangedInputError: pictures were changed or removed.
        InputFaultError: the folder of pictures stays away.
        CorpusError: the folder belongs to a run with other arguments; or a kind of bad rows is asked for that
            no finished part has.
    """
    options = job.options
    change = SourceChange.GROWN if options.append else SourceChange.NONE
    change = SourceChange.CHANGED if options.recheck_input else change
    journal.require_agreement(arguments, change)
    again = _parts_of_kinds(journal.done, options.retry_bad)
    n_rows = None
    if options.recheck_input:
        changed, n_rows = _changed_parts(job, journal, record)
        again |= changed
    else:
        known = (part for part in journal.done if part not in again)
        record.require_same_pictures(known, job.source.patience)
    absent = [part for part, done in journal.done.items() if MISSING_FOLDER in done.bad_kinds]
    again.update(record.parts_of_found_folders(absent))
    journal.reopen(sorted(again))
    journal.agree(arguments, change=change, n_rows=n_rows)
    record.write_files(job.source)
    job.known_content = _content_of(journal.done)
    job.known_end = journal.n_rows


def require_same_stream(job: Job, done: Mapping[int, PartRecord], n_rows: int | None) -> None:
    """Read a source that is known by its name alone to its end, and compare it with what was embedded.

    Args:
        done: Finished parts.
        n_rows: Rows of the whole source.

    Raises:
        ChangedInputError: it gives other rows.
    """
    known = _content_of(done)
    found = finished_parts_read_again(job, known)
    for part in sorted(known.keys() - found.unchanged.keys()):
        require_content(part, known[part], "")
    if n_rows is not None and found.n_rows != n_rows:
        raise more_or_fewer_rows(n_rows)


def _parts_of_kinds(done: Mapping[int, PartRecord], kinds: tuple[str, ...]) -> set[int]:
    found = {kind for record in done.values() for kind in record.bad_kinds}
    unknown = sorted(set(kinds) - found)
    if unknown and found:
        raise CorpusError(
            f"No finished part has bad rows of the kind {unknown[0]!r}; the kinds are {sorted(found)}."
        )
    return {part for part, record in done.items() if set(kinds) & set(record.bad_kinds)}


def _changed_parts(job: Job, journal: Journal, record: InputRecord) -> tuple[set[int], int | None]:
    """Return the finished parts whose rows changed, and the source's number of rows if it is known now.

    What can be read once only is needed for embedding, so that all its parts are embedded again.
    """
    done = {**journal.done, **journal.lost}
    if not done or is_read_once(job.source):
        return set(done), None
    found = finished_parts_read_again(job, _content_of(journal.done))
    same = {part: journal.done[part] for part in sorted(found.unchanged)}
    changed = (done.keys() - same.keys()).union(_with_other_columns(job, journal.store, same))
    for part in same.keys() - changed:
        record.write_pictures(part, found.unchanged[part])
    return changed, found.n_rows


def _content_of(done: Mapping[int, PartRecord]) -> dict[int, str]:
    """Return the hash of what was read for each finished part that has one."""
    return {part: record.content for part, record in done.items() if record.content}


def _with_other_columns(job: Job, store: Store, done: Mapping[int, PartRecord]) -> Iterator[int]:
    """Yield the parts whose kept columns are not those of the source."""
    kept = KeptColumns.of(job.source, job.options.keep)
    if kept is None:
        return
    filesystem, root = store.arrow()
    for part, record in done.items():
        vectors, bad_rows, _ = files_of_part(part)
        if vectors not in record.files:
            continue
        start = part * job.options.rows_per_part
        is_good = np.ones(record.rows, dtype=np.bool_)
        if bad_rows in record.files:
            bad = parquet().read_table(f"{root}/{bad_rows}", columns=["row"], filesystem=filesystem)
            is_good[bad["row"].to_numpy() - start] = False
        now = kept.rows(start, start + record.rows).filter(pyarrow().array(is_good))
        written = parquet().read_table(f"{root}/{vectors}", columns=list(kept.names), filesystem=filesystem)
        if not written.select(list(kept.names)).replace_schema_metadata(None).equals(now):
            yield part


def remedy_of_kinds(kinds: Collection[str], columns: Columns) -> str:
    """Return a further remedy that frequent kinds of bad rows suggest, with a space in front; or nothing."""
    if "unknown-language" in kinds and columns.language is not None:
        return (
            f" The language codes are read from column {columns.language!r}; --language-column none leaves "
            "it alone, and --language sets one for all."
        )
    if "wrong-id" in kinds:
        return (
            " The ids are of several types, or beyond int64; --id-type string stores all as text, --id none "
            "numbers the rows."
        )
    if "undecodable-text" in kinds:
        return (
            " Bytes that are not UTF-8 are of another encoding; --text-encoding names it, such as "
            "--text-encoding cp1252."
        )
    if "missing-folder" in kinds or "missing-file" in kinds:
        return " Relative paths are looked up beside the file that names them; --retry-bad reads them again."
    return ""
