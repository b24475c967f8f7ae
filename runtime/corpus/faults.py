"""Faults of storage: what is a file's own, what is denied, and what may pass and is tried again.

A missing file, a folder in place of a file and a malformed name stay what they are. A full table of open
files, an I/O error, a reset connection, a busy server or a short answer may pass: they are tried again with
growing pauses, and never recorded as a fault of the row that met them.
"""

from __future__ import annotations

import errno
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

from runtime.errors import BabeltowerError, CorpusError, InputFaultError
from runtime.logs import LOGGER

__all__ = ["PATIENCE_S", "FaultKind", "Patience", "ShortReadError", "fault_kind", "without_query"]

T = TypeVar("T")

PATIENCE_S = 60.0
"""Seconds for which a fault of storage is tried again."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"#)]*")
_ABSENT = (404, 410)
_DENIED = (401, 402, 403, 407)
_MAY_PASS = (408, 409, 421, 423, 425, 429)
"""HTTP statuses of the 400s; the others are the request's own fault."""

_OWN = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EILSEQ)


class FaultKind(Enum):
    """Cause of a failed read: the file is absent, its name is wrong, access is denied, or it may pass."""

    ABSENT = "absent"
    OWN = "own"
    DENIED = "denied"
    PASSING = "passing"


class ShortReadError(OSError):
    """Storage delivered fewer bytes than the file has."""


def fault_kind(error: BaseException) -> FaultKind:
    """Classify an error that storage raised."""
    status = _status(error)
    if isinstance(status, int) and status >= 300:
        return _kind_of_status(status)
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__  # fsspec reports any failed request for a file's size as a missing file
        if cause is None or cause is error or isinstance(cause, LookupError):
            return FaultKind.ABSENT
        return fault_kind(cause)
    if isinstance(error, PermissionError):
        return FaultKind.DENIED
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
        return FaultKind.OWN
    if isinstance(error, OSError):
        return FaultKind.OWN if error.errno in _OWN else FaultKind.PASSING
    if isinstance(error, (ValueError, TypeError)):  # a malformed name or URL
        return FaultKind.OWN
    return FaultKind.PASSING


def _status(error: BaseException) -> Any:
    """Return the HTTP status of an error, as clients of HTTP and of S3 keep it."""
    status = getattr(error, "status", None)
    response = getattr(error, "response", None)
    if status is None and isinstance(response, Mapping):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _kind_of_status(status: int) -> FaultKind:
    if status in _ABSENT:
        return FaultKind.ABSENT
    if status in _DENIED:
        return FaultKind.DENIED
    if 400 <= status < 500 and status not in _MAY_PASS:
        return FaultKind.OWN
    return FaultKind.PASSING


class Patience:
    """Repetition of failed reads, with pauses that double from 0.05 s to 5 s.

    Safe to use from several threads; a copy sent to another process has the same limit.

    Args:
        seconds: Time after the first failure during which a read is repeated.
    """

    def __init__(self, seconds: float = PATIENCE_S) -> None:
        self.seconds = seconds
        self._ended = threading.Event()
        self._last_success = time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        return Patience, (self.seconds,)

    def renew(self) -> None:
        """Wait again in later calls, after ``end``."""
        self._ended.clear()

    def end(self) -> None:
        """Stop waiting, in all threads: the run is over."""
        self._ended.set()

    def pause(self, seconds: float) -> None:
        """Wait, at most as long as a fault is tried again, unless the run ends."""
        self._ended.wait(min(seconds, self.seconds))

    def succeeded_since(self, moment: float) -> bool:
        """Check whether any read succeeded after a moment of ``time.monotonic()``."""
        return self._last_success > moment

    def call(
        self,
        what: str,
        read: Callable[[], T],
        *,
        absent_may_pass: bool = False,
        verb: str = "read",
        fault: type[CorpusError] = InputFaultError,
    ) -> T:
        """Call ``read`` until it succeeds; a fault that cannot pass is raised as it is.

        Args:
            what: Name of what is read, for the error message.
            absent_may_pass: Also try again where the file is absent: it was there before.
            verb: What is done to it: ``read`` or ``written``.
            fault: Class of the error.

        Raises:
            InputFaultError: access is denied, or the fault did not pass in time; or another ``fault``.
        """
        first: float | None = None
        pause = _FIRST_PAUSE_S
        while True:
            try:
                result = read()
            except BabeltowerError:
                raise
            except Exception as error:
                kind = fault_kind(error)
                if kind is FaultKind.OWN or (kind is FaultKind.ABSENT and not absent_may_pass):
                    raise
                now = time.monotonic()
                first = now if first is None else first
                wait = max(pause * random.uniform(0.8, 1.2), _asked_pause_s(error))
                if kind is FaultKind.DENIED or now + wait - first > self.seconds or self._ended.is_set():
                    raise fault(_message(what, error, kind, verb, now - first)) from error
                LOGGER.info("%s cannot be %s (%s); trying again in %.1f s", what, verb, _words(error), wait)
                self._ended.wait(wait)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                self._last_success = time.monotonic()
                return result


def without_query(text: str) -> str:
    """Cut the queries of URLs in a text: those of signed URLs are secrets, and change from day to day."""
    return _QUERY.sub(r"\1?…", text)


def _asked_pause_s(error: BaseException) -> float:
    """Return the seconds that a server asks to wait, at most a minute."""
    headers = getattr(error, "headers", None)
    asked = headers.get("Retry-After") if isinstance(headers, Mapping) else None
    return min(60.0, float(asked)) if isinstance(asked, str) and asked.isdecimal() else 0.0


def _message(what: str, error: BaseException, kind: FaultKind, verb: str, seconds: float) -> str:
    if kind is FaultKind.DENIED:
        return (
            f"{what} cannot be {verb}: access is denied ({_words(error)}). Grant it, or renew the "
            "credentials or the signed URL, and run the same command again."
        )
    return (
        f"{what} cannot be {verb}, although it was tried again for {seconds:.1f} s ({_words(error)}). "
        "Once its storage answers, run the same command again: it continues."
    )


def _words(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    shown = cause or error
    text = without_query(" ".join(str(shown).split()))
    return f"{type(shown).__name__}: {text}" if text else type(shown).__name__
