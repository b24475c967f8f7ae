"""A run in a process of its own that can be stopped at a chosen step, as a power cut would.

    python killed_runs.py MODEL SOURCE OUT [STEP COUNT WHEN]

STEP is a function of ``os`` that brings files to the disk: ``fsync``, ``link`` or ``replace``. The process is
killed at its COUNT-th call, ``before`` or ``after`` it.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys

from corpus_runs import options

from runtime.corpus import Columns, embed_corpus


def die_at(step: str, count: int, when: str) -> None:
    real = getattr(os, step)
    numbers = itertools.count(1)  # each call its own, also while another thread's call is under way

    def dying(*arguments, **keywords):
        number = next(numbers)
        if number == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **keywords)
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, step, dying)


def main() -> None:
    model, source, out, *fault = sys.argv[1:]
    if fault:
        die_at(fault[0], int(fault[1]), fault[2])
    embed_corpus(
        model, source, out, options(rows_per_part=32, npy=True, columns=Columns(id="id", text="text"))
    )


if __name__ == "__main__":
    main()
