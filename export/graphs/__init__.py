"""ONNX graphs: files, edits and rewrites."""
