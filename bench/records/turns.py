"""Records of ways that took turns, with every turn on a line of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.records.environment import environment

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["write_turns"]


def write_turns(
    path: Path, schema: str, facts: Mapping[str, Any], turns: Mapping[str, Sequence[DataclassInstance]]
) -> None:
    """Write a JSON object: schema, environment, facts, and the turns of each way."""
    data = {"schema": schema, "environment": asdict(environment()), **facts}
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()]
    ways = []
    for way, of_way in turns.items():
        rows = ",\n   ".join(json.dumps(asdict(turn)) for turn in of_way)
        ways.append(f"  {json.dumps(way)}: [\n   {rows}\n  ]")
    lines.append(' "turns": {\n' + ",\n".join(ways) + "\n }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
