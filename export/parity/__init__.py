"""Parity with PyTorch: measurements, limits and the gate."""
