"""Classification set of the samples: 1,911 held-out drawings, named in 106 languages."""

from __future__ import annotations

from bench.datasets.class_sets import ClassificationSet, ClassNames, Prompts
from export.retrieval.sample_set import sample_retrieval_set as read_emoji
from runtime.errors import LanguageError
from runtime.zeroshot import templates_from_language

__all__ = ["read_emoji", "read_emoji_classes"]


def read_emoji_classes() -> ClassificationSet:
    """Read the samples: every drawing is its own class, and a language has the drawings that it names.

    The sample towers were trained on bare names, so these are the default prompts; 40 languages have
    templates too.
    """
    samples = read_emoji()
    languages = tuple(
        ClassNames(entry.code, entry.language, entry.image_of, entry.texts, _templates(entry.language))
        for entry in samples.captions
    )
    class_of = tuple(range(len(samples.images)))
    return ClassificationSet(
        "emoji", samples.images, class_of, languages, Prompts.LABELS, samples.notes, samples.credit
    )


def _templates(language: str) -> tuple[str, ...]:
    try:
        return templates_from_language(language)
    except LanguageError:
        return ()
