"""The commands privacy and audit."""

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedlora.cli.arguments import File, Overrides
from fedlora.cli.progress import warn
from fedlora.errors import UserError
from fedlora.printable import printable


def privacy(
    file: File,
    overrides: Overrides = None,
    examples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="For one client with N training examples; the data are not read."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compute the privacy guarantee of an experiment before it is run: its noise and its epsilon.

    For records, of the clients at the quantiles of the numbers of examples, and of the one that uses its examples the most.
    """
    from fedlora.config.experiment import Experiment
    from fedlora.planning import client_sizes, plan_of
    from fedlora.privacy.release import leaving
    from fedlora.report import privacy_tables

    experiment = Experiment.load(file, overrides or ())
    unit, count = experiment.privacy.unit, experiment.clients.size
    if unit == "none":
        raise UserError(
            f"{file}: has no differential privacy; add a section [privacy] with unit = 'record' or 'client', epsilon and "
            "delta (docs/privacy.md), or try --set privacy.unit=record --set privacy.epsilon=8 "
            "--set privacy.delta=1e-5 --set evaluate.clients=none"
        )
    leaving(experiment)
    if examples is not None and unit == "client":
        raise UserError("--examples: expected privacy.unit = 'record', found 'client'; remove the option")
    if examples is not None:
        sizes = {"": examples}
    elif unit == "client" and count is not None and experiment.data.task is None:
        sizes = {str(i): 1 for i in range(count)}
    else:
        sizes = client_sizes(experiment)
    plan = plan_of(experiment, sizes)
    assert plan is not None
    if as_json:
        print(privacy_tables.to_json(plan))
        return
    Console().print(privacy_tables.table(plan))
    for warning in privacy_tables.warnings(plan):
        warn(warning, "yellow")


def audit(
    file: File,
    overrides: Overrides = None,
    canaries: Annotated[int, typer.Option(min=10, help="The number of canaries, each included by a fair coin.")] = 200,
    guesses: Annotated[
        int | None,
        typer.Option(min=1, help="The number of guesses on each side; by default a tenth of the canaries."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train an experiment with canaries, and print the empirical lower bound on epsilon beside the claimed epsilon.

    The exit code is 1 if the bound is above the claim. The trained model is not kept.
    """
    from fedlora.auditing import audit as audit_experiment
    from fedlora.config.experiment import Experiment

    experiment = Experiment.load(file, overrides or ())
    found = audit_experiment(experiment, canaries, guesses, notify=lambda note: warn(note, "yellow"))
    if as_json:
        print(found.to_json())
    else:
        Console().print(Text(printable(found.text())), soft_wrap=True)
    if found.exceeds:
        warn("the lower bound is above the claimed epsilon: the mechanism does not do what it claims", "red")
        raise typer.Exit(1)
