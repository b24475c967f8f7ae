"""Soaks, faults and costs of what serves: Triton, its front ends and the gateway."""
