"""Temporary folders of a server, and the removal of those whose server was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from runtime.errors import EngineError

__all__ = [
    "REGION",
    "SHARED_MEMORY",
    "note_regions",
    "owner_descriptor",
    "plain_folder",
    "remove_left_behind",
]

SHARED_MEMORY = Path("/dev/shm")

_OWNER, _REGIONS = "owner", "regions"
"""Files of a folder: locked as long as a process of its server lives; and the names of its shared memory."""

REGION = re.compile(r"triton_\w+_shm_region_[\w-]+")
"""Name of a Python model's region, in the folder ``SHARED_MEMORY``."""

_PLAIN = re.compile(r"[A-Za-z0-9._/+@%-]+")
"""Paths that neither a shell nor Triton's lists of folders read otherwise."""

_PLAIN_PARENTS = ("/tmp", "/var/tmp", "/dev/shm")


@contextlib.contextmanager
def plain_folder(prefix: str) -> Iterator[Path]:
    """Create a temporary folder at a path without special characters; removed at the end.

    Folders of the same prefix whose owners were killed are removed first.

    Raises:
        EngineError: there is no such place that can be written.
    """
    for parent in (tempfile.gettempdir(), *_PLAIN_PARENTS):
        if not _PLAIN.fullmatch(parent):
            continue
        try:
            made = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
        except OSError:
            continue
        with made as folder, contextlib.closing(_Owner(Path(folder))):
            remove_left_behind(Path(parent), prefix)
            yield Path(folder)
        return
    raise EngineError(
        f"A server needs a temporary folder whose path has only letters, digits and '._/+@%-'; none of "
        f"{[tempfile.gettempdir(), *_PLAIN_PARENTS]} can be written. Set TMPDIR to one."
    )


class _Owner:
    """Lock of a folder, which the kernel releases when the process is killed."""

    def __init__(self, folder: Path) -> None:
        draft = folder / f"{_OWNER}.part"  # locked before others see it
        self._descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        draft.rename(folder / _OWNER)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


@contextlib.contextmanager
def owner_descriptor(folder: Path) -> Iterator[int]:
    """Yield a descriptor that a child process inherits: as long as it lives, the folder has an owner."""
    descriptor = os.open(folder / _OWNER, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield descriptor
    finally:
        os.close(descriptor)


def note_regions(folder: Path, regions: Collection[str]) -> None:
    """Write down the names of a server's shared memory, for whoever removes the folder."""
    path, text = folder / _REGIONS, "\n".join(sorted(regions))
    with contextlib.suppress(OSError):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            draft = folder / f"{_REGIONS}.part"
            draft.write_text(text, encoding="utf-8")
            draft.rename(path)


def remove_left_behind(parent: Path, prefix: str) -> list[Path]:
    """Remove folders whose owners were killed, with their shared memory; return them.

    One that has no lock yet, or is another user's, is left.
    """
    removed = []
    for folder in sorted(parent.glob(f"{prefix}*")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            descriptor = os.open(folder / _OWNER, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid != os.geteuid():
                    continue
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it lives
                regions = folder / _REGIONS
                names = regions.read_text(encoding="utf-8").split() if regions.is_file() else []
                for name in filter(REGION.fullmatch, names):
                    (SHARED_MEMORY / name).unlink(missing_ok=True)
                shutil.rmtree(folder)
                removed.append(folder)
            finally:
                os.close(descriptor)
    return removed
