"""Compare retrieval with PyTorch's vectors and with an exported model's."""
