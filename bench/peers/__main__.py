"""Measure every peer beside babeltower, on the same weights, inputs and thread, in one run.

    python -m bench.peers [MODEL …] [--peer NAME …] [--json bench/results/peers.json]

Each peer runs in a process with its own environment, made on demand. A time counts only if the vectors equal
the reference's; a peer that cannot run is a row with its error. docs/adding/peer.md tells how to add one.
Cases where babeltower is behind are printed; with ``--require-ahead`` they also give exit code 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.models.sample_exports import FAMILIES, sample_export
from bench.models.samples import CHECKPOINTS
from bench.peers.environments import FOLDER
from bench.peers.measure import Processes, measure_case, processes
from bench.peers.models import GivenModel, given_model
from bench.peers.registry import OWN, PEERS, Peer
from bench.peers.verdicts import error_table, peer_table, verdict_table, verdicts_of
from bench.records.record import Record, write_records
from runtime.commands.reporting import ErrorReportingCommand
from runtime.errors import InputError
from runtime.manifest import Manifest, Modality, Precision

app = typer.Typer(add_completion=False)

PRECISIONS = (Precision.FP32, Precision.BF16, Precision.INT8)


def measure_model(
    model: GivenModel, peers: Sequence[Peer], running: Processes, *, turns: int, towers: Sequence[Modality]
) -> list[Record]:
    """Measure every case of a model with all peers; a tower's models are opened together."""
    records = []
    for modality in towers:
        running.open(peers, model, modality)
        for case in (case for case in model.cases if case.modality is modality):
            here = [peer for peer in peers if peer.stage is case.stage]
            records += measure_case(here, running, model, case, turns=turns)
    return records


def chosen_peers(names: Sequence[str], model: Path) -> list[Peer]:
    """Return babeltower's exported forms of the model, and the named peers (by default all).

    Raises:
        InputError: there is no such peer.
    """
    known = list(dict.fromkeys(peer.name for peer in PEERS))
    if unknown := sorted(set(names) - set(known)):
        raise InputError(f"There is no peer {unknown[0]!r}; there are {known}.")
    manifest = Manifest.read(model)
    opened = {(v.precision, e) for v in manifest.variants.values() for e in v.engines}
    own = [peer for peer in OWN if (peer.precision, peer.engine) in opened]
    return own + [peer for peer in PEERS if not names or peer.name in names]


@app.command(cls=ErrorReportingCommand)
def peers(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Samples; by default one per family.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="A peer's name; all by default.")] = None,
    tower: Annotated[list[Modality] | None, typer.Option(help="Both by default.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows per run; 1, 8 and 32 by default.")] = None,
    turns: Annotated[int, typer.Option(min=3, help="Samples of each cell.")] = 9,
    environments: Annotated[
        Path, typer.Option(envvar="BABELTOWER_PEERS", help="Folder of the peers' environments.")
    ] = FOLDER,
    every: Annotated[bool, typer.Option("--all", help="Print every peer, not only the best.")] = False,
    require_ahead: Annotated[
        bool, typer.Option("--require-ahead", help="Exit code 1 if babeltower is behind.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the records.")] = None,
) -> None:
    """Run every peer beside babeltower, and report where babeltower is behind."""
    console = Console(width=150)
    started = time.monotonic()

    def say(what: str) -> None:
        console.print(f"[{time.monotonic() - started:4.0f} s] {what}", markup=False, highlight=False)

    records: list[Record] = []
    with processes(environments, say) as running:
        for name in models or FAMILIES:
            say(f"{name}: export and reference")
            export = sample_export(name, PRECISIONS)
            for precision, error in export.errors.items():
                say(f"{name}: no {precision.value}: {error}")
            given = given_model(
                CHECKPOINTS / name, export.model, FOLDER / "models" / name, batches=batch or (1, 8, 32)
            )
            for modality in tower or Modality:
                say(f"{name}: {modality.value}")
                asked = chosen_peers(peer or [], export.model)
                records += measure_model(given, asked, running, turns=turns, towers=[modality])
                if json_file is not None:
                    write_records(records, json_file)
    say("done")
    verdicts = verdicts_of(records)
    tables: list[Table] = [error_table(records), verdict_table(verdicts)]
    if every:
        tables.insert(1, peer_table(verdicts))
    console.print(*tables)
    behind = [verdict for verdict in verdicts if verdict.word == "behind"]
    console.print(f"{len(verdicts)} comparisons, behind in {len(behind)}.")
    raise typer.Exit(int(require_ahead and bool(behind)))


if __name__ == "__main__":
    app()
