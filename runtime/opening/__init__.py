"""Opening check: an opened tower must reproduce PyTorch's vectors for its probes."""
