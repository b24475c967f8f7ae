"""Models that are measured."""
