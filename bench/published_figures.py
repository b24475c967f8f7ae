"""Published retrieval figures, to read beside one's own: never merged with them, always with their source."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "PublishedFigures", "published_figures"]


@dataclass(frozen=True, slots=True)
class PublishedFigures:
    """What a source reports of one model on one data set.

    ``values`` are percentages, of what ``measure`` says.
    """

    dataset: str
    family: str
    model: str
    measure: str
    values: tuple[float, ...]
    source: str

    def __str__(self) -> str:
        values = " / ".join(f"{value:.1f}" for value in self.values)
        return f"{self.model}: {self.measure} {values} ({self.source})"


_XM3600 = ("text→image R@1/5/10, mean over 36 languages", "open_clip's results; first captions alone")
_XTD = ("text→image R@1/10, mean over 11 languages", "Babel-ImageNet's XTD results")
_FLAGAI = "FlagAI's README"
_MEAN = "mean recall, text→image / image→text"
_CAPIVARA = "CAPIVARA's paper"

PUBLISHED: tuple[PublishedFigures, ...] = (
    *(
        PublishedFigures("crossmodal3600", family, model, _XM3600[0], values, _XM3600[1])
        for family, model, values in (
            ("nllb-clip", "nllb-clip-base", (36.5, 64.4, 74.9)),
            ("nllb-clip", "nllb-clip-large", (44.3, 71.7, 80.7)),
            ("nllb-clip", "nllb-clip-base-siglip", (50.7, 76.0, 83.5)),
            ("nllb-clip", "nllb-clip-large-siglip", (54.6, 79.1, 86.1)),
            ("nllb-clip", "nllb-siglip-mrl-large", (60.8, 83.3, 89.2)),
            ("capivara", "xlm-roberta-base-ViT-B-32, CAPIVARA's base", (42.6, 64.9, 71.7)),
        )
    ),
    *(
        PublishedFigures("xtd10", family, model, _XTD[0], values, _XTD[1])
        for family, model, values in (
            ("nllb-clip", "nllb-clip-base", (42.7, 84.2)),
            ("nllb-clip", "nllb-clip-large", (54.7, 91.4)),
            ("nllb-clip", "nllb-clip-large-siglip", (66.2, 93.8)),
            ("altclip", "AltCLIP-m9", (48.0, 81.2)),
        )
    ),
    PublishedFigures(
        "flickr30k-cn", "altclip", "AltCLIP", "text→image R@1/5/10", (69.8, 89.9, 94.7), _FLAGAI
    ),
    PublishedFigures(
        "flickr30k-cn", "altclip", "AltCLIP", "image→text R@1/5/10", (84.8, 97.4, 98.8), _FLAGAI
    ),
    PublishedFigures(
        "capivara", "capivara", "CAPIVARA on Flickr30k", f"{_MEAN}, pt", (79.56, 89.95), _CAPIVARA
    ),
    PublishedFigures(
        "capivara", "capivara", "CAPIVARA on MS COCO", f"{_MEAN}, pt", (56.27, 71.24), _CAPIVARA
    ),
    PublishedFigures(
        "capivara", "capivara", "CAPIVARA on PraCegoVer", f"{_MEAN}, pt", (66.40, 64.75), _CAPIVARA
    ),
)


def published_figures(dataset: str, family: str) -> tuple[PublishedFigures, ...]:
    """What is published of a family on a data set; empty for most pairs."""
    return tuple(entry for entry in PUBLISHED if (entry.dataset, entry.family) == (dataset, family))
