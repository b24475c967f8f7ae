"""ONNX graphs: files, edits and graph passes."""
