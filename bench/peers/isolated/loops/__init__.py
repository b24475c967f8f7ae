"""Loops of the peers, one module per library: ``opened(task)`` returns inputs → unit vectors."""
