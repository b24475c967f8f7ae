"""Traffic of a client without a pause, beside what a test does to the server."""

from __future__ import annotations

import numpy as np
from serving import wait_until

from bench.timing.background import Background
from runtime import Encoder
from runtime.probes import Probes
from runtime.remote import Connection

__all__ = ["Traffic"]


class Traffic(Background):
    """The same texts embedded again and again by our client; every vector is compared.

    Attributes:
        n_rounds: Times that all texts were answered, and right.
        n_texts: Texts of these.
        errors: What was raised, a wrong vector included.
    """

    def __init__(
        self,
        address: str,
        probes: Probes,
        connection: Connection,
        *,
        every: int = 50,
        n_threads: int = 1,
        pause_s: float = 0.0,
    ) -> None:
        super().__init__(*[self._embed] * n_threads)
        self.n_rounds = self.n_texts = 0
        self.errors: list[Exception] = []
        self._address, self._connection, self._pause_s = address, connection, pause_s
        rows = slice(0, 400, every)
        self._texts, self._languages = probes.texts[rows], probes.languages[rows]
        self._expected = probes.text_vectors[rows]

    def _embed(self) -> None:
        with Encoder.open(self._address, connection=self._connection) as encoder:
            while not self.is_over.is_set():
                try:
                    found = encoder.embed_texts(self._texts, self._languages)
                    assert np.abs(found - self._expected).max() <= 1e-5
                    self.n_rounds += 1
                    self.n_texts += len(found)
                except Exception as error:
                    self.errors.append(error)
                self.is_over.wait(self._pause_s)

    def wait_for_more(self) -> None:
        """Wait until some more rounds have ended, or one has failed."""
        known = self.n_rounds
        wait_until(lambda: self.n_rounds > known + 2 or self.errors, "the traffic goes on")
