"""The embedding-space fingerprint."""
