"""The command evaluate."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora.cli.arguments import Client, Trained, UsageOverrides
from fedlora.cli.progress import warn


def evaluate(
    path: Trained,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The examples; by default the test set of the run.")
    ] = None,
    client: Client = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON object.")] = False,
    overrides: UsageOverrides = None,
) -> None:
    """Evaluate a run's current adapter, an exported adapter or a merged model on other data.

    Task, columns and metrics are those of the run.
    """
    from fedlora.evaluating import evaluate as metrics_of
    from fedlora.report import scores

    file = None if data is None else str(data)
    found = metrics_of(path, file, client=client, overrides=overrides or (), notify=lambda note: warn(note, "yellow"))
    if as_json:
        print(scores.to_json(found))
    else:
        Console().print(scores.table(found))
