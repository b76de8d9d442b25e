"""The `fedlora` command: its subcommands, and the exit codes of errors."""

import sys
from typing import Annotated

import typer

from fedlora.cli import chat, compare, demo, deploy, describe, evaluating, predicting, privacy, runs, sweeps
from fedlora.cli.progress import interruptible, warn
from fedlora.errors import RunStopped, UserError
from fedlora.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
on_this_machine = typer.Typer(no_args_is_help=True, help="Deployments on this machine, for local testing.")


def _print_version(wanted: bool | None) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    """Federated fine-tuning of transformers with LoRA adapters."""


for command in (
    runs.run,
    runs.export,
    demo.demo,
    sweeps.sweep,
    compare.compare,
    evaluating.evaluate,
    predicting.predict,
    chat.chat,
    describe.init,
    describe.check,
    describe.methods,
    describe.settings,
    privacy.privacy,
    privacy.audit,
    deploy.serve,
    deploy.join,
    deploy.keys,
):
    app.command()(command)
app.add_typer(on_this_machine, name="deploy")
on_this_machine.command()(deploy.local)


def main() -> None:
    """Runs the command line. Exit codes: 0 success, 1 the run stopped, 2 invalid input, 130 Ctrl-C."""
    try:
        with interruptible():
            app()
    except KeyboardInterrupt:
        warn("interrupted", "yellow")
        sys.exit(130)
    except UserError as error:
        warn(f"error: {error}", "red")
        sys.exit(2)
    except RunStopped as error:
        warn(f"stopped: {error}", "red")
        sys.exit(1)
