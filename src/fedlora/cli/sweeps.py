"""Command for sweeps."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora.cli.arguments import Overrides
from fedlora.cli.progress import interruptible, warn
from fedlora.errors import RunStopped
from fedlora.printable import printable


def sweep(
    file: Annotated[Path | None, typer.Argument(metavar="[SWEEP.TOML]", show_default=False)] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="A new directory; by default one in runs/.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="SWEEP_DIR", help="Resume the sweep in this directory; failed runs are repeated.")
    ] = None,
    devices: Annotated[int, typer.Option(help="The number of processes that share the runs, each on its own device.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs without starting any.")] = False,
) -> None:
    """Run experiments that differ in some settings, with several seeds and a search, or resume such a sweep."""
    from fedlora.report.sweep_progress import SweepLines, SweepTable
    from fedlora.runs.sweep_plan import SweepPlan
    from fedlora.sweeping import open_sweep, read_sweep, run_sweep

    if dry_run:
        if resume is None:
            missing = SweepPlan(read_sweep(file, overrides or ())).missing({})
        else:
            folder, outcomes = open_sweep(file, out, resume, overrides or ())
            folder.release()
            missing = folder.plan.missing(outcomes)
        print(*map(printable, missing), f"{len(missing)} runs", sep="\n")
        return
    folder, outcomes = open_sweep(file, out, resume, overrides or (), devices)
    again = f"resume with: {shlex.join(['fedlora', 'sweep', '--resume', str(folder.path)])}"
    console = Console()
    try:
        with interruptible():
            if sys.stdout.isatty():
                with SweepTable(console, folder.plan, outcomes) as table:
                    result = run_sweep(folder, outcomes, table, devices)
                console.print(table.table())
            else:
                result = run_sweep(folder, outcomes, SweepLines(console, folder.plan, outcomes), devices)
    except RunStopped as error:
        raise RunStopped(f"{error}; {again}") from error
    except KeyboardInterrupt:
        warn(f"interrupted; {again}", "yellow")
        raise typer.Exit(130) from None
    print(printable(f"sweep directory  {result.folder}"))
    if any(one.runs for one in result.cases):
        print(printable(f"tables           {shlex.join(['fedlora', 'compare', str(result.folder)])}"))
    failed = [(one.label, seed, reason) for one in result.cases for seed, reason in one.failed.items()]
    for label, seed, reason in failed:
        warn(f"failed: {label}, seed {seed}: {reason}", "red")
    if failed:
        warn(f"{len(failed)} runs failed; to repeat them, {again}", "red")
        raise typer.Exit(1)
