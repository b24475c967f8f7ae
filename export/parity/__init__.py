"""Parity with PyTorch: measurements, limits and the retrieval gate."""
