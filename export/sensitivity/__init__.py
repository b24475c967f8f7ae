"""INT8 sensitivity: what each matrix product costs in retrieval."""
