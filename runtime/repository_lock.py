"""Lock of a repository: one command at a time changes its files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from runtime.errors import RepositoryInUseError

__all__ = ["LOCK_FILE", "holder_of_lock", "repository_lock"]

LOCK_FILE = ".babeltower.lock"
"""Name of the lock file; it exists while a command holds it, and its text says which."""

_PATIENCE_S = 0.5
"""Time to try for the lock: ``holder_of_lock`` shares it for an instant."""

_SERVE = "serve"
_SERVE_PATIENCE_S = 60.0
"""Time to try for it while `serve` holds it, which it does only to end what a failed rollout left."""

_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""Repositories that this thread's command holds, so that the commands it is made of may nest."""


@contextlib.contextmanager
def repository_lock(repository: Path, command: str) -> Iterator[bool]:
    """Hold the lock of a repository; the kernel releases it if the process is killed.

    Args:
        repository: The folder; it must exist.
        command: Command that asks, for the message of others.

    Yields:
        True where the lock was taken here, False where a caller of this block holds it.

    Raises:
        RepositoryInUseError: another process or thread holds it; the message says which.
        OSError: the folder cannot be written.
    """
    repository = repository.resolve()
    if repository in _held.get():
        yield False
        return
    path = repository / LOCK_FILE
    descriptor = _taken(path)
    if descriptor is None:
        holder = _said(path)
        remedy = "Wait until it has ended, then try again."
        if holder.startswith(f"`babeltower {_SERVE}`"):
            remedy = "It is ending an interrupted rollout; try again when it says that it has."
        raise RepositoryInUseError(f"{repository} is in use by {holder}. {remedy}")
    reset = _held.set(_held.get() | {repository})
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        said = f"`babeltower {command}`, process {os.getpid()} on {socket.gethostname()}, since {since}"
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, said.encode(), 0)
        yield True
    finally:
        _held.reset(reset)
        path.unlink(missing_ok=True)  # before the release: see _taken
        os.close(descriptor)


def holder_of_lock(repository: Path) -> str | None:
    """Return the words on the command that holds a repository's lock; ``None`` if nobody does."""
    path = repository.resolve() / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _said(path)
    else:
        return None
    finally:
        os.close(descriptor)


def _taken(path: Path) -> int | None:
    """Return a descriptor that holds the lock, or ``None`` if another does."""
    began = time.monotonic()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            is_served = _said(path).startswith(f"`babeltower {_SERVE}`")
            if time.monotonic() > began + (_SERVE_PATIENCE_S if is_served else _PATIENCE_S):
                return None
            time.sleep(0.02)
            continue
        except OSError:
            os.close(descriptor)
            raise
        # Its former holder removes the file: a lock on a removed file would exclude nobody.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _said(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := path.read_text(encoding="utf-8").strip():
            return text
    return "another babeltower command"
