"""Layouts of exported towers for other servers than Triton, one file a layout."""
