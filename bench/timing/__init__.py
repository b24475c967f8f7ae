"""Timing of processes, requests and graphs."""
