"""Entry point of ``babeltower`` and ``python -m runtime.commands``: Ctrl-C is one line from the start."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

__all__ = ["main"]

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main() -> None:
    """Import and run the command line."""
    try:
        from runtime.commands.app import main as run

        run()
    except KeyboardInterrupt:  # before a command runs
        print("interrupted", file=sys.stderr)
        _end()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _end()
        raise


def _end() -> NoReturn:
    """End at once: threads of an interrupted engine abort the process where Python ends in its own way."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
