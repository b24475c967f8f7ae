"""TensorRT engines and plans."""
