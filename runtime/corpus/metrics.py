"""Prometheus metrics of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from runtime.corpus.journal import PartRecord
from runtime.corpus.options import Watcher
from runtime.corpus.slices import Counts
from runtime.errors import CorpusError
from runtime.extras import needing

__all__ = ["metrics_served"]


@contextmanager
def metrics_served(port: int | None, *, inner: Watcher | None = None) -> Iterator[Watcher]:
    """Serve ``/metrics`` on a port during a run; without a port, pass ``inner`` through.

    Raises:
        CorpusError: the port is taken.
        MissingPackageError: prometheus_client is not installed.
    """
    watcher = inner or Watcher()
    if port is None:
        yield watcher
        return
    with needing("A port for metrics", "babeltower[corpus]"):
        from prometheus_client import CollectorRegistry, Counter, start_http_server
    registry = CollectorRegistry()
    counters = {
        name: Counter(f"babeltower_corpus_{name}", f"{name.replace('_', ' ')} of this run", registry=registry)
        for name in ("rows", *(name for name in Counts.__dataclass_fields__ if name != "rows"), "parts")
    }
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise CorpusError(f"Metrics cannot be served on port {port}: {error}. Choose another one.") from error

    def observe(n_rows: int, counts: Counts) -> None:
        for name, value in {**asdict(counts), "rows": n_rows}.items():
            counters[name].inc(value)
        watcher.observe(n_rows, counts)

    def part_done(record: PartRecord) -> None:
        counters["parts"].inc()
        watcher.part_done(record)

    try:
        yield replace(watcher, observe=observe, part_done=part_done)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
