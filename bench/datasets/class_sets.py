"""What every classification layout is read into: images of a class each, and the classes' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from export.retrieval.metrics import Int, Relevance
from export.retrieval.sets import ImageSource
from runtime.errors import DatasetError
from runtime.preprocessing.languages import code_among

__all__ = ["BARE_LABEL", "ClassNames", "ClassificationSet", "Prompts"]

BARE_LABEL = ("{}",)
"""The template of the bare label."""


class Prompts(str, Enum):
    """What a class is asked by."""

    LABELS = "labels"
    TEMPLATES = "templates"


@dataclass(frozen=True, slots=True)
class ClassNames:
    """The classes that one language names; they alone, and their images, are asked in it.

    Attributes:
        code: The data set's own code, unique within the set.
        language: FLORES-200 code; ``None`` where there is none: a tower with language tokens is not asked.
        classes: Indices of the set's classes, each once.
        labels: Their names; two classes may share one, as people's names for them do.
        templates: Each with ``{}`` for the name; empty where the set has none in this language.
    """

    code: str
    language: str | None
    classes: tuple[int, ...]
    labels: tuple[str, ...]
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.classes or len(self.classes) != len(self.labels):
            raise DatasetError(
                f"Language {self.code!r} has {len(self.classes)} classes and {len(self.labels)} labels; "
                "expected as many, and at least one."
            )
        if len(set(self.classes)) != len(self.classes):
            twice = sorted({c for c in self.classes if self.classes.count(c) > 1})
            raise DatasetError(f"Language {self.code!r} names the classes {twice[:5]} more than once.")
        empty = [c for c, label in zip(self.classes, self.labels, strict=True) if not label.strip()]
        if empty:
            raise DatasetError(f"Language {self.code!r}: the classes {empty[:5]} have an empty label.")
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong:
            raise DatasetError(
                f"Language {self.code!r}: the templates {wrong[:3]} lack one {{}} for the label."
            )


@dataclass(frozen=True, slots=True)
class ClassificationSet:
    """Images of classes, and the classes' names in one or more languages.

    Attributes:
        name: Name of the layout.
        images: Each of one class.
        class_of: For each image, the index of its class.
        languages: One entry a language code.
        prompts: What the classes are asked by: as read, what published evaluations or the samples ask by.
        notes: What the reader chose or left out, for the report.
        credit: Whose images and names these are.
    """

    name: str
    images: tuple[ImageSource, ...]
    class_of: tuple[int, ...]
    languages: tuple[ClassNames, ...]
    prompts: Prompts = Prompts.TEMPLATES
    notes: tuple[str, ...] = ()
    credit: str = ""

    def __post_init__(self) -> None:
        if not self.images or len(self.images) != len(self.class_of):
            raise DatasetError(
                f"{self.name} has {len(self.images)} images and {len(self.class_of)} classes of them; "
                "expected as many, and at least one."
            )
        if not self.languages or len(set(self.codes)) != len(self.codes):
            raise DatasetError(
                f"{self.name} has languages {list(self.codes)}; expected at least one, none twice."
            )
        shown = set(self.class_of)
        empty = [names.code for names in self.languages if not shown.intersection(names.classes)]
        if empty:
            raise DatasetError(f"{self.name} has no image of any class that {empty[:8]} name.")

    @property
    def codes(self) -> tuple[str, ...]:
        """The data set's own language codes, in order."""
        return tuple(names.code for names in self.languages)

    def select(self, codes: Sequence[str]) -> ClassificationSet:
        """The same set in some languages, named by own or any language code, in the set's order.

        Raises:
            DatasetError: a code that the set does not hold.
        """
        known = set(self.codes) | {names.language for names in self.languages if names.language}
        wanted = {code_among(code, known) or code for code in codes}
        unknown = wanted - known
        if unknown:
            raise DatasetError(
                f"{self.name} has no class names in {sorted(unknown)}; it has {list(self.codes)}. "
                "Name some of these."
            )
        kept = tuple(n for n in self.languages if n.code in wanted or n.language in wanted)
        return dataclasses.replace(self, languages=kept)

    def asked_by(self, prompts: Prompts) -> ClassificationSet:
        """The set with these prompts; a language without the wanted templates is left out, with a note.

        Raises:
            DatasetError: templates are wanted, and no language has any.
        """
        if prompts is Prompts.LABELS:
            bare = tuple(dataclasses.replace(names, templates=BARE_LABEL) for names in self.languages)
            return dataclasses.replace(self, languages=bare, prompts=prompts)
        kept = tuple(names for names in self.languages if names.templates)
        if not kept:
            raise DatasetError(
                f"{self.name} has no templates in any of {list(self.codes)}; pass --prompts labels to ask by "
                "the bare labels."
            )
        left_out = [names.code for names in self.languages if not names.templates]
        note = f"Left out, no templates: {', '.join(left_out)}. --prompts labels asks them by the bare label."
        notes = (*self.notes, note) if left_out else self.notes
        return dataclasses.replace(self, languages=kept, prompts=prompts, notes=notes)

    def rows(self, names: ClassNames) -> Int:
        """int64: indices of the images whose class the language names."""
        return np.flatnonzero(np.isin(np.array(self.class_of), np.array(names.classes))).astype(np.int64)

    def relevance(self, names: ClassNames) -> Relevance:
        """Which of the language's classes each of its images (``rows``) belongs to."""
        place = {c: index for index, c in enumerate(names.classes)}
        rows = self.rows(names)
        answers: Int = np.array([place[self.class_of[row]] for row in rows], dtype=np.int64)
        return Relevance(np.arange(len(rows), dtype=np.int64), answers, len(rows), len(names.classes))
