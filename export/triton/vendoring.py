"""Find the project modules that a file imports, to copy them into a model folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

__all__ = ["code_of_module"]

_PACKAGES = ("runtime", "triton_models")
_DATA = {
    "runtime/preprocessing/languages.py": ("runtime/preprocessing/languages.csv",),
    "runtime/preprocessing/language_tags.py": ("runtime/preprocessing/language_tags.json",),
}
"""Data files that a module reads, by module."""


def code_of_module(path: Path) -> list[str]:
    """List the files of ``runtime`` and ``triton_models`` that a module imports, and their data files.

    Indirect imports are included; imports under TYPE_CHECKING and lazy imports of a package's ``__init__``
    are not.

    Returns:
        Paths relative to the packages' parent folder, with forward slashes, sorted.
    """
    found: set[str] = set()
    todo = list(_imported(path.read_text(encoding="utf-8")))
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            found.update(_DATA.get(file, ()))
            package, _, inner = file.partition("/")
            todo += _imported((files(package) / inner).read_text(encoding="utf-8"))
    return sorted(found)


def _imported(source: str) -> Iterator[str]:
    for node in _running(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in _PACKAGES:
                yield from _files_of(name)


def _files_of(name: str) -> Iterator[str]:
    """Yield the module's file and the ``__init__`` files of its parent packages."""
    package, *rest = name.split(".")
    for depth in range(len(rest) + 1):
        parts = rest[:depth]
        for inner in ("/".join([*parts, "__init__.py"]), "/".join(parts) + ".py"):
            if (files(package) / inner).is_file():
                yield f"{package}/{inner}"


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _running(child)
