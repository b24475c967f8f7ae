"""Lower precisions of an FP32 graph."""
