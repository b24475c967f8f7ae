"""Benchmark records, their statistics and comparison."""
