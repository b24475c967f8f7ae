"""The sample data that comes with the project: 1,911 held-out drawings, named in 106 languages."""

from __future__ import annotations

from export.retrieval.sample_set import sample_retrieval_set as read_emoji

__all__ = ["read_emoji"]
