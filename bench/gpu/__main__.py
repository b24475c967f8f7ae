"""Command line of the GPU measurement; see the package's docstring.

python -m bench.gpu {bundle,run,report,tensorrt} …
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from runtime.errors import BabeltowerError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_BUNDLE = Path("build/gpu-bundle")


@app.command()
def bundle(
    out: Annotated[Path, typer.Option(help="Folder of the bundle; an earlier bundle is replaced.")] = _BUNDLE,
    wheel: Annotated[
        Path | None, typer.Option("--onnxruntime", help="Wheel of onnxruntime-gpu; downloaded by default.")
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Folder for downloads and full-size graphs, some 15 GB; kept.")
    ] = Path("build/gpu-work"),
    architecture: Annotated[int, typer.Option(help="Compute capability as one number.")] = 90,
    sample: Annotated[
        list[str] | None, typer.Option(help="Sample to carry for the gate; may be repeated; default: all.")
    ] = None,
) -> None:
    """Write everything that a machine with a GPU needs for the measurement, 64 MiB at most."""
    from bench.gpu.bundle import build_bundle, require_replaceable
    from bench.models.samples import SAMPLES

    require_replaceable(out)
    build_bundle(out, wheel=wheel, work=work, architecture=architecture, samples=sample or SAMPLES)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    minutes: Annotated[float, typer.Option(help="Time for all steps.")] = 7.0,
    only: Annotated[str, typer.Option(help="Steps to run, separated by commas; all by default.")] = "",
    dry: Annotated[bool, typer.Option(help="Run the same code on the processor with tiny towers.")] = False,
    work: Annotated[Path, typer.Option(help="Folder for temporary files, some 20 GB.")] = Path(
        "/tmp/gpu-run"
    ),
) -> None:
    """Run all steps on a machine with a GPU; exit code 1 if one failed."""
    from bench.gpu.run import require_runnable, run_steps

    steps = [name.strip() for name in only.split(",") if name.strip()]
    require_runnable(bundle, out, steps)
    folders = (bundle.resolve(), out.resolve(), work.resolve())
    failed = run_steps(*folders, minutes=minutes, dry=dry, only=steps)
    raise typer.Exit(1 if failed else 0)


@app.command(hidden=True)
def step(
    name: str,
    bundle: Path,
    out: Path,
    work: Path,
    ends_at: float,
    dry: bool = False,
    part: str = "",
    until: float = 0.0,
) -> None:
    """Perform one step in this process."""
    from bench.gpu.lines import Bench
    from bench.gpu.run import perform

    bench = Bench(bundle, out, work, dry, ends_at)
    try:
        perform(name, bench, part=part, until=until)
    except Exception as error:
        trace = traceback.format_exc()[-2000:]
        bench.emit(step=name, what=part, error=f"{type(error).__name__}: {error}"[:900], trace=trace)
        raise typer.Exit(1) from None


@app.command()
def simulate(
    json: Annotated[Path, typer.Option(help="File of the records.")] = Path("build/cuda_simulated.json"),
    work: Annotated[Path, typer.Option(help="Folder for exported samples and vectors; kept.")] = Path(
        "build/gpu-simulated"
    ),
    sample: Annotated[
        list[str] | None, typer.Option(help="Sample to judge; may be repeated; default: all.")
    ] = None,
    form: Annotated[
        list[str] | None, typer.Option(help="fp16, bf16 or packed (FP16); may be repeated; default: all.")
    ] = None,
) -> None:
    """Judge the samples' graphs for CUDA in simulated FP16 and BF16, here; exit code 1 if one fails."""
    from bench.gpu.simulated import SIMULATED_FORMS, judge_simulated
    from bench.models.samples import SAMPLES
    from bench.records.record import write_records

    records = judge_simulated(work.resolve(), sample or SAMPLES, form or SIMULATED_FORMS, typer.echo)
    json.parent.mkdir(parents=True, exist_ok=True)
    write_records(records, json)
    raise typer.Exit(0 if all(record.settings["passes"] for record in records) else 1)


@app.command()
def report(
    record: Annotated[Path, typer.Argument(help="gpu.json of a run.")],
    out: Annotated[Path, typer.Option(help="Folder of the page and its pictures.")] = Path(
        "build/gpu-report"
    ),
) -> None:
    """Render a run as a page with pictures."""
    from bench.gpu.report import write_report

    write_report(record, out)


def main() -> None:
    """Run the command line; an expected failure is one line."""
    from bench.gpu.tensorrt import main as tensorrt

    app.command("tensorrt")(tensorrt)
    try:
        app()
    except BabeltowerError as error:
        typer.echo(str(error), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
