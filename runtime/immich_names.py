"""Names by which immich knows its models; another name it neither loads nor asks for."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["KNOWN_MODELS", "name_of_architecture"]

KNOWN_MODELS: Mapping[str, int] = {
    "nllb-clip-base-siglip__v1": 768,
    "nllb-clip-base-siglip__mrl": 768,
    "nllb-clip-large-siglip__v1": 1152,
    "nllb-clip-large-siglip__mrl": 1152,
    "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k": 512,
    "XLM-Roberta-Large-ViT-H-14__frozen_laion5b_s13b_b90k": 1024,
    "ViT-B-32__openai": 512,
    "ViT-L-14__openai": 768,
    "ViT-H-14__laion2b-s32b-b79k": 1024,
}
"""Names that immich knows, and the width of the vectors that its database expects under each: those of
multilingual models, and one more for each width of a family here."""

_NAME_OF_ARCHITECTURE: Mapping[tuple[str, bool], str] = {
    ("nllb-clip-base-siglip", False): "nllb-clip-base-siglip__v1",
    ("nllb-clip-base-siglip", True): "nllb-clip-base-siglip__mrl",
    ("nllb-clip-large-siglip", False): "nllb-clip-large-siglip__v1",
    ("nllb-clip-large-siglip", True): "nllb-clip-large-siglip__mrl",
    ("xlm-roberta-base-ViT-B-32", False): "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k",
    ("xlm-roberta-large-ViT-H-14", False): "XLM-Roberta-Large-ViT-H-14__frozen_laion5b_s13b_b90k",
}
"""Name by architecture in open_clip, and by having MRL heads."""


def name_of_architecture(architecture: str, *, dim: int, has_mrl_heads: bool) -> str | None:
    """Return immich's name of a published architecture; ``None`` if it has none of this width."""
    name = _NAME_OF_ARCHITECTURE.get((architecture, has_mrl_heads))
    return name if name is not None and KNOWN_MODELS[name] == dim else None
