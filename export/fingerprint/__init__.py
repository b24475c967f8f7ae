"""Fingerprint of the embedding space."""
