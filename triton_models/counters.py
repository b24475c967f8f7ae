"""Counters that accumulate in memory and are published to Triton's metrics every five seconds.

Each increment of a Triton metric is a message to the server's process; a batch of 32 texts in 32 languages
would wait for 40 of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping

__all__ = ["DESCRIPTIONS", "Counters", "LabelledName", "bucket_label"]

LabelledName = tuple[str, tuple[tuple[str, str], ...]]
"""Name of a counter, and its labels sorted by name."""

DESCRIPTIONS: Mapping[str, str] = {
    "babeltower_texts_total": "Texts embedded",
    "babeltower_texts_by_language_total": "Texts embedded, by their given language (FLORES-200)",
    "babeltower_truncated_texts_total": "Texts truncated to the context length",
    "babeltower_tokens_total": "Tokens of the texts, including special tokens",
    "babeltower_padding_tokens_total": "Padding tokens computed, up to the longest text of a call",
    "babeltower_tower_calls_total": "Calls of the text tower, by range of padded length in tokens",
    "babeltower_images_total": "Images embedded",
    "babeltower_decode_failures_total": "Images that could not be decoded",
    "babeltower_failed_requests_total": "Requests answered with an error, by reason",
}


class Counters:
    """Named counters with labels; safe to use from several threads.

    Args:
        publish: Function that adds an amount to a counter of the server.
        labels: Labels of every counter, e.g. the model's name.
        log: Function that receives a line where publishing fails.
        interval_s: Seconds between publications.
    """

    def __init__(
        self,
        publish: Callable[[LabelledName, int], None],
        labels: Mapping[str, str],
        *,
        log: Callable[[str], None],
        interval_s: float = 5.0,
    ) -> None:
        self._publish = publish
        self._labels = dict(labels)
        self._log = log
        self._interval_s = interval_s
        self._pending: Counter[LabelledName] = Counter()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="babeltower-counters", daemon=True)
        self._thread.start()

    def declare(self, name: str, **labels: str) -> None:
        """Publish a counter at 0, so that its first increment shows in a rate."""
        self._accumulate((name, tuple(labels.items())), 0)

    def add(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add an amount to a counter."""
        if amount:
            self._accumulate((name, tuple(labels.items())), amount)

    def add_each(self, name: str, label: str, amounts: Mapping[str, int]) -> None:
        """Add an amount for each value of one label."""
        with self._lock:
            for value, amount in amounts.items():
                self._pending[name, ((label, value),)] += amount

    def flush(self) -> None:
        """Publish the accumulated counts; those that cannot be published are logged, and kept for later."""
        with self._lock:
            pending, self._pending = self._pending, Counter()
        kept: Counter[LabelledName] = Counter()
        failure: Exception | None = None
        for key, amount in pending.items():
            try:
                self._publish(self._labelled(key), amount)
            except Exception as error:  # one that ends the thread would be seen by nobody
                kept[key], failure = amount, error
        if failure is not None:
            self._log(f"{len(kept)} counters are not published yet: {type(failure).__name__}: {failure}")
            with self._lock:
                self._pending.update(kept)

    def close(self) -> None:
        """Stop the thread and publish the remaining counts."""
        self._closed.set()
        self._thread.join()
        self.flush()

    def _accumulate(self, key: LabelledName, amount: int) -> None:
        with self._lock:
            self._pending[key] += amount

    def _labelled(self, key: LabelledName) -> LabelledName:
        name, labels = key
        return name, tuple(sorted({**self._labels, **dict(labels)}.items()))

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s):
            self.flush()


def bucket_label(length: int) -> str:
    """Return the label of a bucket's range of lengths: ``1-8``, ``9-16``, ``17-32``, …"""
    upper = 8
    while upper < length:
        upper *= 2
    return f"{1 if upper == 8 else upper // 2 + 1}-{upper}"
