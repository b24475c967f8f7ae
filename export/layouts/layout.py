"""Interface of a layout: where a server looks for a model, which files it reads, and what it computes.

A layout is made from the towers of a variant as the exporter wrote them. It only changes how inputs reach
their graphs, so a new one is a file beside this with a row in ``export/layouts/registry.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from export.layouts.names import LayoutName
from export.parity.consumer import Consumer
from export.towers import Towers
from runtime.manifest import Engine, Modality, Precision

__all__ = ["Layout", "LayoutRequest", "ModelPlace"]


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
        threads: Threads of a run; None uses all cores.
    """

    towers: Towers
    graphs: Mapping[Modality, Path]
    place: ModelPlace
    folder: Path
    precision: Precision = Precision.FP32
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Model folder of another server, or a page.

    Attributes:
        engine: Engine that the server runs graphs with.
        place: Function that finds a model's place from its towers and the name that the user chose; it
            raises ``ExportError`` where the server has no such model.
        write: Function that writes the model and returns further notes for the user.
        open: Function that opens the written model as the server does, for the parity gate.
        precision: Precision that is written where none is asked for.
    """

    name: LayoutName
    engine: Engine
    place: Callable[[Towers, str | None], ModelPlace]
    write: Callable[[LayoutRequest], tuple[str, ...]]
    open: Callable[[LayoutRequest], Consumer]
    precision: Precision = Precision.FP32
