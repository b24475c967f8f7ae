"""Retrieval with PyTorch's vectors and with an exported model's: sets, vectors, recall, and the verdict."""
