"""Preprocessing: text and images to the integers that towers take."""
