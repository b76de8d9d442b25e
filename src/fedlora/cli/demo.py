"""The command demo."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedlora.cli.arguments import Out, Overrides
from fedlora.cli.progress import follow
from fedlora.config.demos import DEMOS, Demo
from fedlora.printable import printable

if TYPE_CHECKING:
    from fedlora.config.experiment import Experiment
    from fedlora.runs.result import Result


def demo(
    name: Annotated[Demo, typer.Argument(metavar="[chapters | generation]", show_default=False)] = "chapters",
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Run a built-in example on the documentation of Python's standard library.

    chapters (default): ten clients fine-tune a MiniLM to tell the chapters apart.

    generation: eight clients teach SmolLM2, a language model, to write the first sentence about a function.
    """
    from fedlora.api import run
    from fedlora.config.experiment import build
    from fedlora.models.loading import locate
    from fedlora.runs.start import new_folder

    experiment = build(DEMOS[name], overrides or ())
    locate(experiment.model)  # the package may be missing, and reading the data takes seconds
    if name == "generation":
        Console().print(Text(_introduction(experiment)))
    path = out or new_folder(experiment)
    result = follow(path, experiment.rounds, lambda progress: run(experiment, path, progress))
    if name == "generation":
        _show(result)


def _introduction(experiment: "Experiment") -> str:
    clients, count = experiment.clients.count, experiment.evaluate.generate
    model = printable(Path(experiment.model).name.removesuffix(".gguf"))
    teach = f"teach {model}, a language model, to write the first sentence of a function's documentation"
    has = "Each has the functions of one chapter of Python's library reference, and sends the server only LoRA factors."
    return f"""\
{clients} clients {teach} from its signature. {has}

1. The model writes a sentence about each of {count} test functions, before training.
2. In {experiment.rounds} rounds, each client trains the adapter, and the server averages the adapters.
3. The model writes about the test functions again.
"""


def _show(result: "Result") -> None:
    """Prints the answers before and after training, and the next commands."""
    from fedlora.report.before_after import summary

    console = Console()
    if (found := summary(result)) is not None:
        console.print("", found)
    run = shlex.quote(str(result.folder))
    lines = [
        f"fedlora chat {run}    # type a signature; /base switches to the model before training",
        f"fedlora export {run} model --to gguf-merged --dtype bf16    # model/model.gguf, for llama.cpp",
    ]
    if shutil.which("fedlora") is None and (activate := Path(sys.prefix, "bin", "activate")).is_file():
        lines.insert(0, f". {shlex.quote(str(activate))}    # puts fedlora on the path")
    console.print("\nNext:")
    for line in lines:
        console.print(Text(printable(f"  {line}")), soft_wrap=True)
