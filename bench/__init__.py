"""Measure exported towers against the PyTorch checkpoints they came from."""
