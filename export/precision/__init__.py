"""Convert FP32 graphs to lower precisions."""
