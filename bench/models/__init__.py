"""Models for the benchmarks."""
