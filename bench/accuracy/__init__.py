"""Accuracy: retrieval, zero-shot classification and search."""
