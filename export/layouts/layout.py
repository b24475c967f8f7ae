"""Interface of a layout: where a server looks for a model, which files it reads, and what it computes.

A layout is made from the towers of a variant as the exporter wrote them. It only changes how inputs reach
their graphs, so a new one is a file beside this with a row in ``export/layouts/registry.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from export.layouts.names import LayoutName
from export.parity.consumer import Consumer
from export.towers import Towers
from runtime.manifest import Engine, Modality, Precision

__all__ = ["Layout", "LayoutRequest", "ModelPlace", "OpenModel"]


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """Place of a model in a server's folder.

    Attributes:
        name: Name by which the server asks for the model.
        folder: Folder of the model, relative to the folder that the user names.
        notes: Sentences for the user: what the server will do with the model that is not obvious.
    """

    name: str
    folder: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayoutRequest:
    """Everything a layout is written from.

    Attributes:
        graphs: Exported graph of each tower, in the precision of the layout.
        folder: Empty folder to write the model to.
    """

    towers: Towers
    graphs: Mapping[Modality, Path]
    place: ModelPlace
    folder: Path


class OpenModel(Protocol):
    """Open a written model as its server does, for the parity gate."""

    def __call__(
        self, folder: Path, place: ModelPlace, *, precision: Precision, threads: int | None
    ) -> Consumer:
        """Open the model in ``folder``."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Model folder of another server.

    Attributes:
        engine: Engine that the server runs graphs with.
        place: Function that finds a model's place from its towers and the name that the user chose; it
            raises ``ExportError`` where the server has no such model.
        write: Function that writes the model.
        open: Function that opens the written model as the server does.
    """

    name: LayoutName
    engine: Engine
    place: Callable[[Towers, str | None], ModelPlace]
    write: Callable[[LayoutRequest], None]
    open: OpenModel
