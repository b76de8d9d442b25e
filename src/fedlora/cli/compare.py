"""The command compare."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedlora.cli.progress import warn
from fedlora.errors import UserError

if TYPE_CHECKING:
    from fedlora.report.comparison import Comparison


def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN_DIR... | SWEEP_DIR", show_default=False)],
    baseline: Annotated[
        str | None, typer.Option(metavar="LABEL", help="The case to which the others are compared; by default the first.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A metric, by default the task's main one and the loss; may be repeated."),
    ] = None,
    to: Annotated[
        Literal["table", "csv", "latex", "markdown", "json"], typer.Option("--format", help="The format of the output.")
    ] = "table",
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
) -> None:
    """Compare runs: mean and spread over seeds, differences with 95 % confidence intervals, costs."""
    from fedlora.report.comparison import compare as compare_runs

    found = compare_runs(paths, baseline=baseline, metrics=metric or ())
    formats = {"csv": found.to_csv, "latex": found.to_latex, "markdown": found.to_markdown, "json": found.to_json}
    text = formats[to]() if to in formats else _table(found, out is None)
    if to == "csv":
        for note in found.notes:
            warn(note, "yellow")
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another file with --out") from error


def _table(found: "Comparison", in_terminal: bool) -> str:
    """The tables as text, with styles if standard output is a terminal."""
    from rich.console import Console

    from fedlora.report import comparison_formats

    console = Console(force_terminal=None if in_terminal else False)
    console.width = max(console.width, comparison_formats.WIDTH)
    with console.capture() as captured:
        console.print(comparison_formats.for_terminal(found.tables(), found.notes))
    return captured.get()
