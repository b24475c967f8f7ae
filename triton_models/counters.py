"""Counters that gather in memory and reach Triton's metrics once a second.

One increment of a Triton metric is a message to the server's process; a batch of 32 texts in as many
languages would wait for 40 of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping

__all__ = ["DESCRIPTIONS", "Counters", "LabelledName", "bucket_label"]

LabelledName = tuple[str, tuple[tuple[str, str], ...]]
"""Name of a counter, and its labels in order of their names."""

DESCRIPTIONS: Mapping[str, str] = {
    "babeltower_texts_total": "Texts embedded",
    "babeltower_texts_by_language_total": "Texts embedded, by the language they named (FLORES-200)",
    "babeltower_truncated_texts_total": "Texts cut to the context length",
    "babeltower_tokens_total": "Tokens of the texts, special ones included",
    "babeltower_padding_tokens_total": "Tokens computed for nothing: padding to the longest text of a call",
    "babeltower_tower_calls_total": "Calls of the text tower, by the range of their padded length in tokens",
    "babeltower_images_total": "Images embedded",
    "babeltower_decode_failures_total": "Images that could not be decoded",
    "babeltower_failed_requests_total": "Requests answered with an error, by reason",
}


class Counters:
    """Named counts with labels; safe to use from several threads.

    Args:
        publish: Adds an amount to a counter of the server.
        labels: Labels that every counter has, e.g. the model's name.
        interval_s: Seconds between two publications.
    """

    def __init__(
        self,
        publish: Callable[[LabelledName, int], None],
        labels: Mapping[str, str],
        *,
        interval_s: float = 1.0,
    ) -> None:
        self._publish = publish
        self._labels = dict(labels)
        self._interval_s = interval_s
        self._pending: Counter[LabelledName] = Counter()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="babeltower-counters", daemon=True)
        self._thread.start()

    def add(self, name: str, amount: int = 1, **labels: str) -> None:
        """Count something."""
        if amount:
            with self._lock:
                self._pending[(name, tuple(sorted({**self._labels, **labels}.items())))] += amount

    def flush(self) -> None:
        """Publish what has gathered."""
        with self._lock:
            pending, self._pending = self._pending, Counter()
        for key, amount in pending.items():
            self._publish(key, amount)

    def close(self) -> None:
        """Publish the rest and stop."""
        self._closed.set()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s):
            self.flush()


def bucket_label(length: int) -> str:
    """The range of lengths that a bucket is counted under: ``1-8``, ``9-16``, ``17-32``, …"""
    upper = 8
    while upper < length:
        upper *= 2
    return f"{1 if upper == 8 else upper // 2 + 1}-{upper}"
