"""Commands for runs on this machine: run, export, demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.arguments import OptionalFile, Out, Overrides, Resume, select_run
from fedlora.cli.progress import follow
from fedlora.exporting.forms import Dtype, Form
from fedlora.printable import printable

if TYPE_CHECKING:
    from fedlora.config.experiment import Experiment


def run(file: OptionalFile = None, overrides: Overrides = None, out: Out = None, resume: Resume = None) -> None:
    """Run an experiment, or resume a run."""
    path, experiment = select_run(file, overrides, out, resume)
    if resume is None:
        _run(experiment, path)
        return
    from fedlora.api import resume as resume_run

    follow(path, experiment.rounds, lambda progress: resume_run(path, progress))


def demo(overrides: Overrides = None, out: Out = None) -> None:
    """Run the built-in example: ten clients fine-tune a MiniLM on the documentation of Python's standard library."""
    from fedlora.config.experiment import build
    from fedlora.config.reading import DEMO
    from fedlora.runs.start import new_folder

    experiment = build(DEMO, overrides or ())
    _run(experiment, out or new_folder(experiment))


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


def _run(experiment: "Experiment", path: Path) -> None:
    from fedlora.api import run as run_experiment

    follow(path, experiment.rounds, lambda progress: run_experiment(experiment, path, progress))
