"""Benchmarks of corpus embedding."""
