"""Weights from checkpoint files and LoRA adapters."""
