"""Weights of checkpoint files and LoRA adapters."""
