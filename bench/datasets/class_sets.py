"""Common form of classification sets: images with one class each, and the classes' names."""

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
"""Template of the bare label."""


class Prompts(str, Enum):
    """Kind of class prompts."""

    LABELS = "labels"
    TEMPLATES = "templates"


@dataclass(frozen=True, slots=True)
class ClassNames:
    """Classes that one language names; the language is evaluated on these and their images only.

    Attributes:
        code: The data set's own code, unique within the set.
        language: FLORES-200 code; ``None`` if there is none, and towers with language tokens skip the
            language.
        classes: Indices of the set's classes, each once.
        labels: Names of the classes; two classes may share one.
        templates: Prompts, each with ``{}`` for the label; empty if the set has none in this language.
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
                "expected equal numbers, at least one."
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
        images: Images, each of one class.
        class_of: Class index of each image.
        languages: One entry per language code.
        prompts: Kind of prompts; a set that was just read has the kind that published evaluations or the
            samples use.
        notes: Choices and omissions of the reader, for the report.
        credit: Credit for the images and names.
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
                f"{self.name} has {len(self.images)} images and {len(self.class_of)} class indices; "
                "expected equal numbers, at least one."
            )
        if not self.languages or len(set(self.codes)) != len(self.codes):
            raise DatasetError(
                f"{self.name} has languages {list(self.codes)}; expected at least one, without duplicates."
            )
        shown = set(self.class_of)
        empty = [names.code for names in self.languages if not shown.intersection(names.classes)]
        if empty:
            raise DatasetError(f"{self.name} has no image of any class that {empty[:8]} name.")

    @property
    def codes(self) -> tuple[str, ...]:
        """Language codes of the data set, in order."""
        return tuple(names.code for names in self.languages)

    def select(self, codes: Sequence[str]) -> ClassificationSet:
        """Return the set in some languages, in the set's order; any form of a language code works.

        Raises:
            DatasetError: the set does not have a code.
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
        """Return the set with these prompts; languages without such templates are left out, with a note.

        Raises:
            DatasetError: templates are wanted, and no language has any.
        """
        if prompts is Prompts.LABELS:
            bare = tuple(dataclasses.replace(names, templates=BARE_LABEL) for names in self.languages)
            return dataclasses.replace(self, languages=bare, prompts=prompts)
        kept = tuple(names for names in self.languages if names.templates)
        if not kept:
            raise DatasetError(
                f"{self.name} has no templates in any of {list(self.codes)}; pass --prompts labels to use "
                "the bare labels."
            )
        left_out = [names.code for names in self.languages if not names.templates]
        note = f"Left out, no templates: {', '.join(left_out)}. --prompts labels includes them by bare label."
        notes = (*self.notes, note) if left_out else self.notes
        return dataclasses.replace(self, languages=kept, prompts=prompts, notes=notes)

    def rows(self, names: ClassNames) -> Int:
        """Return int64 indices of the images whose class the language names."""
        return np.flatnonzero(np.isin(np.array(self.class_of), np.array(names.classes))).astype(np.int64)

    def relevance(self, names: ClassNames) -> Relevance:
        """Return the class of each of the language's images (``rows``), among its classes."""
        place = {c: index for index, c in enumerate(names.classes)}
        rows = self.rows(names)
        answers: Int = np.array([place[self.class_of[row]] for row in rows], dtype=np.int64)
        return Relevance(np.arange(len(rows), dtype=np.int64), answers, len(rows), len(names.classes))
