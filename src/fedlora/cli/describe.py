"""Commands that train nothing: init, check, methods, settings."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora.cli.arguments import File, Overrides
from fedlora.cli.new_file import write_new
from fedlora.errors import UserError
from fedlora.printable import printable


def init(file: Annotated[Path, typer.Argument(metavar="[FILE]", show_default=False)] = Path("experiment.toml")) -> None:
    """Write an experiment file with the most common settings and comments; by default experiment.toml."""
    from fedlora.config import starter

    write_new(file, starter.text(), "fedlora init")


def check(file: File, overrides: Overrides = None) -> None:
    """Check an experiment, its data, model and device without training, and list its clients.

    For a language model, the first training example is shown as the model gets it. With privacy, what leaves a client is
    listed, by which guarantee it is covered; and for clients the planned epsilon, for records the command that computes it.
    """
    from fedlora.config.experiment import Experiment
    from fedlora.federated_data import FederatedData
    from fedlora.planning import plan_of
    from fedlora.privacy.release import leaving
    from fedlora.report import tables
    from fedlora.session import check as check_experiment

    experiment = Experiment.load(file, overrides or ())
    federated_data = FederatedData.make(experiment)
    notes = check_experiment(experiment, federated_data)
    console = Console()
    console.width = max(console.width, tables.CLIENTS_WIDTH)
    console.print(tables.clients(federated_data))
    if released := leaving(experiment):
        console.print(tables.released(experiment.privacy.unit, released.values()))
        if experiment.privacy.unit == "client":
            plan = plan_of(experiment, {client.id: client.examples for client in federated_data.clients})
            assert plan is not None
            print(plan.summary())
        else:  # each client has its own noise, which takes seconds to compute
            command = ["fedlora", "privacy", str(file), *(word for text in overrides or () for word in ("--set", text))]
            print(printable(f"planned epsilon: {shlex.join(command)}"))
    for note in notes:
        print(printable(note))


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)] = None,
    secure: Annotated[bool, typer.Option("--secure", help="Only methods that work with secure aggregation.")] = False,
    mixed_ranks: Annotated[
        bool, typer.Option("--mixed-ranks", help="Only methods for clients with different ranks.")
    ] = False,
    personal: Annotated[bool, typer.Option("--personal", help="Only methods with personal models.")] = False,
) -> None:
    """List the methods, or describe one."""
    from fedlora.config.experiment import build
    from fedlora.methods.table import TABLE
    from fedlora.report import tables

    if name is not None:
        if secure or mixed_ranks or personal:
            raise UserError(f"methods {name}: expected a NAME or filters, found both; leave out one of them")
        Console().print(tables.method(build({"method": {"name": name}}).method.row))
        return
    rows = [
        row
        for row in TABLE.values()
        if (not secure or row.secure_sums().startswith("yes"))
        and (not mixed_ranks or row.mixed_ranks)
        and (not personal or row.personal)
    ]
    Console().print(tables.methods(rows) if rows else "no method has all of these properties")


def settings(key: Annotated[str | None, typer.Argument(metavar="[KEY]", show_default=False)] = None) -> None:
    """List the settings of an experiment, or describe one setting or section."""
    from fedlora.config import reference
    from fedlora.report import tables

    console = Console()
    if key is None:
        console.print(tables.settings(reference.settings()))
    else:
        console.print(*map(tables.setting, reference.find(key)))
