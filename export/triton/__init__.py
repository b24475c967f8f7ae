"""Triton model folders and their ``config.pbtxt``."""
