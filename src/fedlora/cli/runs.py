"""Commands for runs on this machine: run and export."""

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.arguments import OptionalFile, Out, Overrides, Resume, select_run
from fedlora.cli.progress import follow
from fedlora.exporting.forms import Dtype, Form
from fedlora.printable import printable


def run(file: OptionalFile = None, overrides: Overrides = None, out: Out = None, resume: Resume = None) -> None:
    """Run an experiment, or resume a run."""
    path, experiment = select_run(file, overrides, out, resume)
    from fedlora.api import resume as resume_run
    from fedlora.api import run as run_experiment

    if resume is None:
        follow(path, experiment.rounds, lambda progress: run_experiment(experiment, path, progress))
    else:
        follow(path, experiment.rounds, lambda progress: resume_run(path, progress))


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False)],
    to: Annotated[
        Form,
        typer.Option(
            help="A PEFT adapter; one for vLLM and LoRAX; the model with the adapter merged into it; "
            "the adapter, or this model, as a file for llama.cpp."
        ),
    ] = "adapter",
    client: Annotated[str | None, typer.Option(help="Only the adapter of this client, for a personal method.")] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="The data type of a merged model; by default that of the model's checkpoint."),
    ] = None,
) -> None:
    """Export the current adapter of a run to the directory OUT."""
    from fedlora.api import export as write

    for folder in write(run_dir, to, out, client, dtype).values():
        print(printable(str(folder)))
