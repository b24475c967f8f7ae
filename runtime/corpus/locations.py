"""Names of sources: brace expansion, suffixes below queries and compressions, and Hive partitions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import unquote

from runtime.errors import InputError

__all__ = [
    "COMPRESSED",
    "PACKED_TARS",
    "compression_of",
    "expanded_braces",
    "first_wildcard",
    "partitions_of",
    "suffix_of",
    "without_location_query",
]

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
"""Suffix → compression of a whole file."""

PACKED_TARS = {".tgz": "gzip", ".tbz2": "bz2", ".txz": "xz", ".tzst": "zstd"}
"""Suffix of a compressed tar → its compression."""

_MOST_EXPANDED = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_WILD = re.compile(r"[*?\[]")
_PARTITION = re.compile(r"([^/=]+)=([^/]*)")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def expanded_braces(location: str) -> list[str]:
    """Expand ``{a,b}`` and ``{000..123}`` as a shell does; other braces are left as they are.

    Raises:
        InputError: there are more than a million names.
    """
    found = next((m for m in _BRACES.finditer(location) if _alternatives(m[1]) is not None), None)
    if found is None:
        return [location]
    alternatives = _alternatives(found[1])
    assert alternatives is not None, "the match has alternatives"
    names: list[str] = []
    for middle in alternatives:
        names += expanded_braces(location[: found.start()] + middle + location[found.end() :])
        if len(names) > _MOST_EXPANDED:
            raise InputError(
                f"The braces of {location} stand for more than {_MOST_EXPANDED:,} names; pass the folder or "
                "a pattern with * instead."
            )
    return names


def _alternatives(inner: str) -> Iterator[str] | None:
    """Return the names that the text between two braces stands for; ``None`` for a text without any."""
    bounds = _RANGE.fullmatch(inner)
    if bounds is None:
        return iter(inner.split(",")) if "," in inner else None
    first, last = int(bounds[1]), int(bounds[2])
    step = max(1, int(bounds[3] or 1)) * (1 if last >= first else -1)
    padded = any(re.match(r"-?0\d", bound) for bound in bounds.groups()[:2])
    width = max(len(bounds[1]), len(bounds[2])) if padded else 0
    count = range(first, last + (1 if step > 0 else -1), step)
    return (f"{number:0{width}d}" for number in itertools.islice(count, _MOST_EXPANDED + 1))


def without_location_query(location: str) -> str:
    """Return a location without the query and fragment of a web address, such as a signature."""
    if location.startswith(("http://", "https://")):
        return re.split(r"[?#]", location, maxsplit=1)[0]
    return location


def first_wildcard(location: str) -> int | None:
    """Return the position of the first ``*``, ``?`` or ``[``; the query of a web address has none."""
    path = without_location_query(location)
    start = path.find("/", path.index("://") + 3) if "://" in path else 0  # [::1] is a host
    found = _WILD.search(path, max(0, start)) if start >= 0 else None
    return None if found is None else found.start()


def suffix_of(location: str) -> str:
    """Return the last suffix in lower case, below a query and a compression: ``.tsv`` of ``a.TSV.gz?x=1``."""
    suffixes = PurePosixPath(without_location_query(location).lower()).suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes else ""


def compression_of(location: str) -> str | None:
    """Return the compression that a file's suffix names."""
    suffix = PurePosixPath(without_location_query(location).lower()).suffix
    return COMPRESSED.get(suffix) or PACKED_TARS.get(suffix)


def partitions_of(name: str) -> dict[str, str | None]:
    """Return the Hive partitions in the folders of a name: ``lang=pt/part.parquet`` has ``lang``."""
    found: dict[str, str | None] = {}
    for folder in name.split("/")[:-1]:
        match = _PARTITION.fullmatch(folder)
        if match is not None:
            value = unquote(match[2])
            found[unquote(match[1])] = None if value == _NULL_PARTITION else value
    return found
