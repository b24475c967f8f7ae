"""Triton model folders and their configuration."""
