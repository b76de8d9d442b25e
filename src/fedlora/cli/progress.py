"""Terminal output of the commands: the progress of a run, its interruption, notices and errors."""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from fedlora.errors import RunStopped
from fedlora.printable import printable

if TYPE_CHECKING:
    from fedlora.rounds.progress import Progress
    from fedlora.runs.result import Result


def follow(path: Path, rounds: int, go: Callable[["Progress"], "Result"], command: Sequence[str] = ("run",)) -> "Result":
    """Shows the progress of a run and its table at the end; if it stops, prints how `command` resumes it.

    Returns the result.
    """
    from fedlora.report import terminal

    console = Console()
    again = f"resume with: {shlex.join(['fedlora', *command, '--resume', str(path)])}"
    try:
        with interruptible(), terminal.Live(console, rounds) as live:
            result = go(live)
    except RunStopped as error:
        raise RunStopped(f"{error}; {again}" if path.exists() else str(error)) from error
    except KeyboardInterrupt:
        started = (path / "experiment.toml").exists()
        warn(f"interrupted; {again}" if started else "interrupted before the first round", "yellow")
        raise typer.Exit(130) from None
    console.print(terminal.closing(result))
    lines = [f"run directory  {result.folder}"]
    if result.best_round is not None:
        lines.append(f"best round     {result.best_round}")
    if "" in result.adapters:
        lines.append(f"PEFT adapter   {result.adapters['']}")
    elif result.adapters:
        folder = next(iter(result.adapters.values())).parent
        lines.append(f"PEFT adapters  {folder}, one for each of {len(result.adapters)} clients")
    if result.left_out:
        lines.append(f"PEFT adapters  {result.left_out}")
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
    return result


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt for Ctrl-C and SIGTERM, also if interrupted compiled code raises another error instead.

    Only the first signal counts: both are ignored afterwards, so that cleanup is not interrupted.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except (Exception, SystemExit) as error:
        if stopped:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


def note(message: str) -> None:
    """Prints one line about a deployment."""
    Console().print(Text(printable(message), "yellow"), soft_wrap=True)
    sys.stdout.flush()


def warn(message: str, style: str) -> None:
    """Prints one line to standard error."""
    Console(stderr=True).print(Text(printable(message), style), soft_wrap=True)
