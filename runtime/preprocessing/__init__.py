"""Preprocessing of texts and images to the integer inputs of the towers."""
