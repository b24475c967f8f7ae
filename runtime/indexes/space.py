"""Space of stored vectors: checks and decoding of rows and queries for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cosines import require_directions, unit_rows
from runtime.embeddings import Encoding, bits_from_float, float_from_encoded
from runtime.encoder import Encoder
from runtime.errors import InputError
from runtime.fingerprints import remark_on_vectors, same_space

__all__ = ["Space", "queries_from_texts"]


@dataclass(frozen=True, slots=True)
class Space:
    """Properties that must be equal for two vectors to be comparable.

    Attributes:
        fingerprint: Identity of the embedding space, ``Encoder.fingerprint``.
        dim: Components of a vector, before bits are packed.
        encoding: Storage format of the vectors.
    """

    fingerprint: str
    dim: int
    encoding: Encoding

    def require(self, fingerprint: str, *, holder: str) -> None:
        """Check that queries are from this space.

        Raises:
            InputError: the fingerprints differ.
        """
        if not same_space(fingerprint, self.fingerprint):
            raise InputError(
                f"{holder} holds vectors of space {self.fingerprint!r}, but the queries are from "
                f"{fingerprint!r}: their scores are meaningless. Embed both with the same model."
                + remark_on_vectors(self.fingerprint, fingerprint)
            )

    def decoded(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """Decode stored rows: float32 (n, dim); see ``float_from_encoded``."""
        return float_from_encoded(vectors, self.encoding, dim=self.dim)

    @property
    def scale(self) -> float:
        """Factor that turns the dot product of a decoded query and row into a score of at most 1."""
        return 1 / self.dim if self.encoding is Encoding.BINARY else 1.0

    def decoded_queries(self, queries: NDArray[Any]) -> NDArray[np.float32]:
        """Decode queries so that their dot products with decoded rows are the scores, up to ``scale``.

        Args:
            queries: float32 or float16 (n, dim) of any norm above zero; or in the space's encoding.

        Returns:
            float32 (n, dim) of unit length; in a binary space their signs, ±1.

        Raises:
            InputError: the width or dtype does not fit, or a query is zero or not finite.
        """
        if queries.ndim != 2 or not self._fits(queries):
            raise InputError(
                f"The queries are {queries.dtype} {queries.shape}; expected float32 (n, {self.dim}), or "
                f"{self.encoding.value} as stored by the encoder. Embed them with dim={self.dim}."
            )
        if queries.dtype == np.uint8:
            return self.decoded(queries)
        floats = self.decoded(queries) if queries.dtype == np.int8 else queries.astype(np.float32)
        require_directions(floats, what="queries")
        if self.encoding is Encoding.BINARY:
            return self.decoded(bits_from_float(floats))
        return unit_rows(floats)

    def _fits(self, queries: NDArray[Any]) -> bool:
        if self.encoding is Encoding.BINARY and queries.dtype == np.uint8:
            return bool(queries.shape[1] == -(-self.dim // 8))
        dtypes = [np.float32, np.float16] + ([np.int8] if self.encoding is Encoding.INT8 else [])
        return bool(queries.shape[1] == self.dim and queries.dtype in dtypes)


def queries_from_texts(
    space: Space, encoder: Encoder, texts: Sequence[str], language: str | Sequence[str] | None, *, holder: str
) -> NDArray[np.float32]:
    """Embed texts as queries of a space.

    Args:
        language: Language code, one for all texts or one per text.
        holder: Folder or file with the vectors, for the error message.

    Returns:
        float32 (texts, dim).

    Raises:
        InputError: the encoder is of another space, checked before embedding; or a text cannot be embedded.
    """
    space.require(encoder.fingerprint, holder=holder)
    vectors: NDArray[np.float32] = encoder.embed_texts(texts, language, dim=space.dim)
    return vectors
