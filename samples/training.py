"""Training that can be stopped at any time and continued, with its curve and the CPU time it took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from runtime.machine import instruction_sets
from runtime.storage import replace_durably

SAVE_EVERY_S = 120.0


def computing_dtype() -> torch.dtype:
    """Return what towers are trained in: bfloat16, or float32 where it is faster.

    A processor without instructions for bfloat16 takes ten times as long for it as for float32.
    """
    has_bfloat16 = {"avx512_bf16", "amx_bf16", "bf16"} & set(instruction_sets())
    return torch.bfloat16 if has_bfloat16 else torch.float32


class Stateful(Protocol):
    """Module, optimiser or sampler: anything whose state can be taken out and put back."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Restore a state."""
        ...


@dataclass(slots=True)
class ResumableRun:
    """State of a training run in ``PATH.run`` and its curve in ``PATH.curve.jsonl``.

    A run that was stopped and continued takes the same steps as one that was not: the random number
    generator's state is saved too.

    Attributes:
        path: Path of both files without their suffix.
        parts: What is trained with, by name.
        settings: What else decides the result; a run is not continued under other ones.
        n_steps: Total number of steps.
        step: Number of steps taken.
        cpu_s: CPU seconds of this run, over all threads and all the times it was continued.
        curve: Figures recorded so far.
    """

    path: Path
    parts: Mapping[str, Stateful]
    settings: Mapping[str, object]
    n_steps: int
    step: int = 0
    cpu_s: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def state_path(self) -> Path:
        """File of the saved state."""
        return self.path.with_name(self.path.name + ".run")

    @property
    def curve_path(self) -> Path:
        """File of the curve, one JSON object a line."""
        return self.path.with_name(self.path.name + ".curve.jsonl")

    def steps(self) -> Iterator[int]:
        """Yield the steps that are left, and save the state every few minutes and at the end."""
        if self.state_path.exists():
            self._load()
        saved_at, counted_to = time.monotonic(), time.process_time()
        for step in range(self.step, self.n_steps):
            yield step
            now = time.process_time()
            self.cpu_s, counted_to = self.cpu_s + now - counted_to, now
            self.step = step + 1
            if self.step == self.n_steps or time.monotonic() - saved_at >= SAVE_EVERY_S:
                self._save()
                saved_at = time.monotonic()

    def record(self, **figures: float) -> None:
        """Add a point to the curve and print it."""
        point = {"step": self.step + 1, "cpu_s": round(self.cpu_s, 1), **figures}
        self.curve.append(point)
        print(f"{self.path.name} {json.dumps(point)}", flush=True)

    def _identity(self) -> dict[str, object]:
        return {**self.settings, "n_steps": self.n_steps, "computed_in": str(computing_dtype())}

    def _load(self) -> None:
        state = torch.load(self.state_path, weights_only=False)
        if state["settings"] != self._identity():
            raise ValueError(
                f"{self.state_path} is a run with {state['settings']}, not {self._identity()}; "
                "remove it to start anew, or use another work folder."
            )
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["random"])
        self.step, self.cpu_s, self.curve = state["step"], state["cpu_s"], state["curve"]
        print(f"{self.path.name} continues at step {self.step} of {self.n_steps}", flush=True)

    def _save(self) -> None:
        state = {
            "settings": self._identity(),
            "step": self.step,
            "cpu_s": self.cpu_s,
            "curve": self.curve,
            "random": torch.get_rng_state(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        save(state, self.state_path)
        lines = "".join(json.dumps(point) + "\n" for point in self.curve)
        replace_durably(self.curve_path, lambda part: part.write_text(lines, encoding="utf-8"))


def save(content: object, path: Path) -> None:
    """Save with torch: the file is complete under its name, or absent."""
    replace_durably(path, lambda part: torch.save(content, part))


def cpu_hours(folder: Path) -> float:
    """Sum the CPU hours of a folder's runs up to the last point of each curve."""
    curves = [path.read_text(encoding="utf-8").splitlines() for path in folder.glob("*.curve.jsonl")]
    return sum(float(json.loads(curve[-1])["cpu_s"]) for curve in curves if curve) / 3600
