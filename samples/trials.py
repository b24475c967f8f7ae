"""Compare settings of the image towers on a training vendor that is held out; the gallery is never looked at.

    python -m samples.trials --work FOLDER --npm-folder FOLDER [--hold-out emojione]

Each trial trains the convolutional teacher, which learns fastest, for the same number of steps. A trial that
was stopped continues. The curves are written to ``FOLDER/trials.json``; ``samples/trials.json`` holds those
so far.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from samples.image_stages import Workplace, train_teacher
from samples.images import ImageSettings

SEED = 20240
NEW_DESIGNS = ("noto-v1", "streamline", "noto-lines", "flagpack", "circle-flags")
TRIALS = {
    "chosen": ImageSettings(),
    "as drawn": ImageSettings(share_restyled=0.0),
    "more restyled": ImageSettings(share_restyled=0.6),
    "weaker changes": ImageSettings(strength=0.3),
    "one way": ImageSettings(both_ways=0.0),
    "fewer vendors": ImageSettings(without=NEW_DESIGNS),
}


def main() -> None:
    """Parse the command line, run the trials that are not finished, and write the figures."""
    parser = argparse.ArgumentParser(description="Compare settings of the image towers.")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--npm-folder", type=Path, required=True, help="folder of npm tarballs")
    parser.add_argument("--hold-out", default="emojione", help="design to measure on")
    parser.add_argument("--steps", type=float, default=0.25, help="factor on the teacher's steps")
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.trials:
        folder = arguments.work / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        work = Workplace(folder, arguments.npm_folder, arguments.hold_out, arguments.steps, TRIALS[name])
        if not (folder / "teacher.pt").exists():
            torch.manual_seed(SEED)
            train_teacher(work)
    report = {
        "held_out": arguments.hold_out,
        "trials": {
            name: {"settings": asdict(settings), "curve": curve}
            for name, settings in TRIALS.items()
            if (curve := _curve(arguments.work / name.replace(" ", "-")))
        },
    }
    path = arguments.work / "trials.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _curve(folder: Path) -> list[dict[str, float]]:
    """Read a trial's curve; empty if it did not run."""
    path = folder / "teacher.curve.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
