"""The sample checkpoints, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "samples" / "checkpoints"
NAMES = ("nllb-clip", "nllb-siglip-mrl", "capivara", "capivara-lora", "altclip")

Exported = Callable[[str], Path]
