"""The opening check: a tower that is opened must reproduce PyTorch's vectors of its probes."""
