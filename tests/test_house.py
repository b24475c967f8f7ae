"""The plan of the house: small rooms, no circles, one home for each fact, names and sentences for readers."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from sample_models import ROOT

PACKAGES = ("runtime", "export", "triton_models", "bench", "samples")
MOST_MODULES = 27


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_room_holds_more_than_one_can_see() -> None:
    rooms: dict[str, int] = defaultdict(int)
    for path in files(*PACKAGES, "tests"):
        rooms[path.parent.relative_to(ROOT).as_posix()] += 1
    assert not {room: n for room, n in rooms.items() if n > MOST_MODULES}


@cache
def imports() -> dict[str, set[str]]:
    """Module → modules that it imports, at its top or in a function; not those for type checkers alone."""
    modules = {module_of(path): path for path in files("runtime", "export", "triton_models", "bench")}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = set()
        for node in running_nodes(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        submodules = {name for name in names if name in modules}
        parents = {name.rpartition(".")[0] for name in submodules if name.rpartition(".")[0] in submodules}
        found[module] = submodules - parents - {module}
    return found


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield child
            yield from running_nodes(child)


def circles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules that reach each other."""
    reached = {module: {module} for module in graph}
    for module in graph:
        todo = [module]
        while todo:
            for other in graph[todo.pop()] - reached[module]:
                reached[module].add(other)
                todo.append(other)
    return {
        group
        for module in graph
        if len(group := frozenset(other for other in reached[module] if module in reached[other])) > 1
    }


def test_the_only_circle_is_the_factory() -> None:
    (circle,) = circles(imports())
    assert circle == {"runtime.encoder", "runtime.local", "runtime.remote", "runtime.remote.encoder"}


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}


def test_no_two_public_classes_of_one_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in files(*PACKAGES):
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(module_of(path))
    del homes["TritonPythonModel"]  # the name that Triton looks for in every model.py
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


FACTS = {
    # the second runs by itself in a container
    r"\.babeltower\.json\"": {"runtime/manifest.py", "runtime/server/readiness.py"},
    r"\"config\.pbtxt\"": {"runtime/triton_config.py"},
    r"\"frontend\.json\"": {"runtime/manifest.py"},
    r"\bModelConfig\(\)|import text_format|text_format\.Parse": {"runtime/triton_config.py"},
    r"def front_end_name": {"runtime/manifest.py"},
    r"sched_getaffinity": {"runtime/machine.py"},
    r"os\.cpu_count\(\)": {"runtime/machine.py", "bench/records/record.py"},  # there: of the whole machine
    r"/proc/meminfo|/proc/cpuinfo\"": {"runtime/machine.py"},
    r"\.name\}.*\.part\"": {"runtime/storage.py"},
    r"\bdraft\.replace\(|\.rename\(stage ": {"runtime/transaction.py", "runtime/repository.py"},  # as one
    r"BABELTOWER_DRAIN\"": {"runtime/draining.py"},
    r"pip install '": {"runtime/extras.py", "runtime/remote/__init__.py"},  # there: in its docstring
    r"which (is not installed|\{found\})": {"runtime/extras.py"},
    r"getLogger\(\"babeltower\"\)": {"runtime/logs.py"},
    r"IMAGE_SUFFIXES = ": {"runtime/preprocessing/image_formats.py"},
    r"\"nllb-siglip-mrl\", \"capivara\", \"capivara-lora\"": {"bench/models/samples.py"},
    r"\"samples\" / \"checkpoints\"": {"bench/models/samples.py"},
}
"""How a fact is written → the files that may write it."""


@pytest.mark.parametrize("fact", FACTS)
def test_each_fact_has_one_home(fact: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in files("runtime", "export", "triton_models", "bench")
        if "isolated" not in path.parts and re.search(fact, text_of(path))
    }
    assert found <= FACTS[fact]
    assert found


RIDDLE = re.compile(r"(what|of|whether|which|how|whom|who|those|where|when|if)\b", re.IGNORECASE)


def test_docstrings_say_the_thing_itself_first() -> None:
    summaries = []
    for path in files(*PACKAGES):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    summaries.append((module_of(path), text.splitlines()[0]))
    riddles = [summary for summary in summaries if RIDDLE.match(summary[1])]
    assert len(riddles) <= 0.01 * len(summaries), riddles


def walks() -> dict[str, list[str]]:
    """Heading → files of its table, from docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = {}
    for section in text.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        steps = re.findall(r"^\| `([\w/]+\.py)` \|", body, re.MULTILINE)
        if steps:
            found[heading] = steps
    return found


@pytest.mark.parametrize("heading", ["A text", "A checkpoint", "A corpus row"])
def test_a_walk_takes_no_step_back(heading: str) -> None:
    steps = walks()[heading]
    assert len(set(steps)) == len(steps)
    graph, reached = imports(), set[str]()
    todo = [step.removesuffix(".py").replace("/", ".") for step in steps]
    # The corpus is imported by the names that its package offers; index and search are run after embed.
    entries = {todo[0], "runtime.corpus.run", "runtime.indexes.build", "runtime.search.answers"}
    stack = list(entries)
    while stack:
        module = stack.pop()
        if module not in reached:
            reached.add(module)
            stack += graph[module]
    assert set(todo) <= reached


def test_the_picture_shows_the_walks() -> None:
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    shown = re.findall(r"class=\"file\"[^>]*>([\w/]+\.py)<", picture)
    assert shown == [step for steps in walks().values() for step in steps]
