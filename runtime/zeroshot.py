"""Zero-shot classification of images by the label with the nearest prompts."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from runtime.cosines import require_directions, unit_rows
from runtime.encoder import Encoder
from runtime.errors import InputError, LanguageError
from runtime.preprocessing.image import ImageSource
from runtime.preprocessing.languages import flores_from_code

__all__ = [
    "Classifier",
    "Prediction",
    "class_vectors_from_prompts",
    "prompts_from_labels",
    "templates_from_language",
]

CLIP_LOGIT_SCALE = 100.0
"""Maximum logit scale in CLIP's training; it sharpens probabilities without changing their order."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Label with its cosine, and its probability among all labels."""

    label: str
    cosine: float
    probability: float


@lru_cache(maxsize=1)
def _templates() -> dict[str, tuple[str, ...]]:
    text = files("runtime").joinpath("templates.csv").read_text(encoding="utf-8")
    found: dict[str, tuple[str, ...]] = {}
    for row in csv.DictReader(text.splitlines()):
        found[row["flores"]] = (*found.get(row["flores"], ()), row["template"])
    return found


def templates_from_language(language: str) -> tuple[str, ...]:
    """Return the prompt templates of a language, each with ``{}`` for the label.

    Raises:
        LanguageError: the language is unknown, or has no templates.
    """
    flores = flores_from_code(language)
    try:
        return _templates()[flores]
    except KeyError:
        raise LanguageError(
            f"There are no prompt templates in {flores}, only in {sorted(_templates())}. Pass your own, "
            "e.g. templates=['a photo of a {}'] in that language, or templates=['{}'] for the bare label."
        ) from None


def prompts_from_labels(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every label in every template, label by label."""
    return [template.replace("{}", label) for label in labels for template in templates]


def class_vectors_from_prompts(vectors: NDArray[np.float32], *, n_labels: int) -> NDArray[np.float32]:
    """Average unit vectors (labels × templates, dim), label by label, to normalised means (labels, dim).

    Raises:
        InputError: the prompts of a label cancel each other out, or are not finite.
    """
    means = vectors.reshape(n_labels, -1, vectors.shape[-1]).mean(axis=1)
    require_directions(means, what="labels' mean prompt vectors")
    return unit_rows(means)


@dataclass(frozen=True, slots=True)
class Classifier:
    """Zero-shot classifier: labels of one language and their vectors.

    Attributes:
        labels: Labels in the caller's order.
        vectors: float32 (labels, dim), L2-normalised.
        encoder: Encoder of the images.
    """

    labels: tuple[str, ...]
    vectors: NDArray[np.float32]
    encoder: Encoder

    @classmethod
    def from_labels(
        cls,
        encoder: Encoder,
        labels: Sequence[str],
        *,
        language: str,
        templates: Sequence[str] | None = None,
        dim: int | None = None,
    ) -> Classifier:
        """Embed every label in every template; a label's vector is the normalised mean of its prompts.

        Args:
            labels: Class names in ``language``.
            language: FLORES-200 or BCP-47 code.
            templates: Templates, each with one ``{}``; default: those of the language.
            dim: One of ``encoder.dims``.

        Raises:
            InputError: there are no labels, a label is repeated, or a template lacks ``{}``.
            LanguageError: the language has no templates and none were passed.

        Source:
            Prompt ensembling: CLIP (arXiv 2103.00020), section 3.1.4.
        """
        chosen = templates_from_language(language) if templates is None else tuple(templates)
        _require_labels(labels)
        _require_templates(chosen)
        vectors = encoder.embed_texts(prompts_from_labels(labels, chosen), language, dim=dim)
        return cls(tuple(labels), class_vectors_from_prompts(vectors, n_labels=len(labels)), encoder)

    def classify(
        self, images: Iterable[ImageSource], *, k: int = 5, logit_scale: float = CLIP_LOGIT_SCALE
    ) -> list[list[Prediction]]:
        """Return the ``k`` best labels of every image, best first.

        Args:
            images: See ``Encoder.embed_images``.
            k: Labels per image; fewer if there are fewer labels.
            logit_scale: Factor of the cosines in the softmax of the probabilities.

        Raises:
            ImageError: an image cannot be decoded.
        """
        if k < 1:
            raise InputError(f"k is {k}; expected at least 1.")
        cosines = self.encoder.embed_images(images, dim=self.vectors.shape[1]) @ self.vectors.T
        probabilities = _softmax(cosines.astype(np.float64) * logit_scale)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        return [
            [Prediction(self.labels[i], float(row[i]), float(shares[i])) for i in best]
            for best, row, shares in zip(order, cosines, probabilities, strict=True)
        ]


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _require_labels(labels: Sequence[str]) -> None:
    if isinstance(labels, str) or not labels:
        raise InputError(f"labels is {labels!r}; pass a list of at least one class name.")
    if len(set(labels)) != len(labels):
        twice = sorted({label for label in labels if list(labels).count(label) > 1})
        raise InputError(f"Labels {twice} are given more than once; pass each label once.")


def _require_templates(templates: Sequence[str]) -> None:
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise InputError(f"Templates {wrong} must have {{}} exactly once, e.g. 'a photo of a {{}}'.")
