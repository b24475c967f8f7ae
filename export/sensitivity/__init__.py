"""INT8 sensitivity: retrieval cost of quantizing each matrix product."""
