"""Agreement of a resumed run with what its finished parts were read from."""

from __future__ import annotations

from collections.abc import Collection

from runtime.corpus.input_record import InputRecord
from runtime.corpus.job import Job, changed_parts
from runtime.corpus.journal import Journal
from runtime.corpus.pictures import MISSING_FOLDER
from runtime.corpus.rows import Columns
from runtime.errors import CorpusError

__all__ = ["agree_on_input", "remedy_of_kinds"]


def agree_on_input(job: Job, journal: Journal, record: InputRecord) -> None:
    """Check the pictures of finished parts, reopen parts that are to be embedded again, and record the files.

    Raises:
        ChangedInputError: pictures were changed or removed.
        CorpusError: a kind of bad rows is asked for that no finished part has.
    """
    options = job.options
    job.known_content = {part: done.content for part, done in journal.done.items() if done.content}
    if options.recheck_input:
        unknown = [part for part in journal.done if part not in job.known_content]
        again = [*unknown, *changed_parts(job)]
        journal.reopen(again)
        job.known_content = {part: job.known_content[part] for part in job.known_content if part not in again}
    else:
        record.require_same_pictures(journal.done)
    absent = [part for part, done in journal.done.items() if MISSING_FOLDER in done.bad_kinds]
    journal.reopen(record.parts_of_found_folders(absent))
    if options.retry_bad:
        _reopen_bad(journal, options.retry_bad)
    record.write_files(job.source)


def _reopen_bad(journal: Journal, kinds: tuple[str, ...]) -> None:
    found = {kind for done in journal.done.values() for kind in done.bad_kinds}
    unknown = sorted(set(kinds) - found)
    if unknown and found:
        raise CorpusError(
            f"No finished part has bad rows of the kind {unknown[0]!r}; the kinds are {sorted(found)}."
        )
    journal.reopen([part for part, done in journal.done.items() if set(kinds) & set(done.bad_kinds)])


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
