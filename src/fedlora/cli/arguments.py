"""Arguments that several commands have, and the run that they select."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.errors import UserError

if TYPE_CHECKING:  # imported on first use: torch takes seconds, and --help should not
    from fedlora.config.experiment import Experiment

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in method.rank=4; may be repeated."),
]
Out = Annotated[Path | None, typer.Option("--out", help="A new directory for the run; by default one in runs/.")]
File = Annotated[Path, typer.Argument(metavar="EXPERIMENT.TOML", show_default=False)]
OptionalFile = Annotated[Path | None, typer.Argument(metavar="[EXPERIMENT.TOML]", show_default=False)]
Trained = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR | ADAPTER | MODEL", show_default=False, help="A run, an exported adapter or a merged model."
    ),
]
UsageOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting, as in data.text=COLUMN; may be repeated (docs/evaluation.md).",
    ),
]
Client = Annotated[str | None, typer.Option(help="The client whose adapter is used, for a personal method.")]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="RUN_DIR", help="Resume the run in this directory; --set rounds=N raises its number of rounds."),
]


def select_run(
    file: Path | None, overrides: list[str] | None, out: Path | None, resume: Path | None
) -> tuple[Path, "Experiment"]:
    """Directory and experiment of the run: the one to resume, or a new one, whose directory need not exist yet.

    Raises:
        UserError: neither a file nor a run, or both; the file, the overrides or the run cannot be used.
    """
    from fedlora.config.experiment import Experiment
    from fedlora.runs.start import extend, new_folder, read_folder

    if resume is None:
        if file is None:
            raise UserError("expected an experiment file or --resume RUN_DIR, found neither")
        experiment = Experiment.load(file, overrides or ())
        return out or new_folder(experiment), experiment
    if file is not None or out is not None:
        raise UserError(
            "--resume: expected no experiment file and no --out, as a run keeps its settings and its directory; "
            "--set rounds=N may raise the number of rounds"
        )
    if overrides:
        extend(resume, overrides)
    return resume, read_folder(resume)
