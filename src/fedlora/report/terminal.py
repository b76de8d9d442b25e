"""Terminal output of a run: live progress and the final table."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedlora.messages import ClientInfo, Round
from fedlora.printable import number, printable
from fedlora.rounds.progress import NullProgress
from fedlora.rounds.progress import Progress as Callbacks
from fedlora.rounds.row import RoundRow
from fedlora.runs.result import Result


class Live:
    """Progress bar of the current round, and one line per complete round."""

    def __init__(self, console: Console, rounds: int) -> None:
        self._console, self._rounds = console, rounds
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("clients"))
        barless = console.is_jupyter and find_spec("ipywidgets") is None  # a bar in a notebook is a widget
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=barless)
        self._task = self._bar.add_task("loading", total=None)

    def __enter__(self) -> "Live":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def notify(self, message: str) -> None:
        """Prints the message."""
        self._console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """Resets the bar."""
        again = f", attempt {rnd.attempt + 1}" if rnd.attempt else ""
        name = f"round {rnd.index + 1}/{self._rounds}{again}"
        self._bar.reset(self._task, total=len(chosen), description=name)

    def answered(self, client: ClientInfo, rejected: str | None) -> None:
        """Advances the bar by one client; prints the name of a rejected client."""
        self._bar.advance(self._task)
        if rejected is not None:
            self._console.print(Text(printable(f"client {client.id} rejected: {rejected}"), "yellow"))

    def round_ended(self, row: RoundRow) -> None:
        """Prints one line with the round's main numbers."""
        loss = [] if row.train_loss is None else [f"loss {row.train_loss:.3f}"]
        spent = [] if row.privacy is None else [f"epsilon {number(row.privacy.epsilon, 3)}"]
        parts = [f"round {row.round}/{self._rounds}", *loss, *_scores(row), *spent, f"{row.seconds.total:.1f} s"]
        self._console.print(Text("  ".join(parts)))
        if row.diverged is not None:
            self._console.print(Text(printable(row.diverged), "yellow"))


@contextmanager
def shown(rounds: int, progress: bool | Callbacks) -> Iterator[Callbacks]:
    """Returns the given callbacks; for True, live progress if standard output is a terminal or a notebook."""
    console = Console()
    if not isinstance(progress, bool):
        yield progress
    elif progress and (console.is_jupyter or sys.stdout.isatty()):
        with Live(console, rounds) as live:
            yield live
    else:
        yield NullProgress()


def closing(result: Result) -> Table:
    """Final table with one line per round; the held-out metric and worst decile are over the clients."""
    metric = result.main_metric
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    first = ("", "", "train", "test", "held-out", "worst", "", "", "")
    second = ("round", "clients", "loss", metric, metric, "decile", "up", "down", "seconds")
    for above, below in zip(first, second, strict=True):
        table.add_column(f"{above}\n{below}", justify="right")
    for row in result.rows:
        clients = None if row.clients is None else row.clients.get(metric)
        table.add_row(
            str(row.round),
            str(len(row.accepted)) + (f" of {len(row.chosen)}" if row.rejected else ""),
            _number(row.train_loss),
            _number(None if row.global_ is None else row.global_[metric]),
            _number(None if clients is None else clients.mean),
            _number(None if clients is None else clients.worst_decile),
            size(row.bytes_up),
            size(row.bytes_down),
            f"{row.seconds.total:.1f}",
        )
    return table


def size(count: int) -> str:
    """Human-readable number of bytes, in powers of 1000."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _scores(row: RoundRow) -> list[str]:
    found, metric = [], row.main_metric
    if metric and row.global_ is not None:
        found.append(f"test {metric} {number(row.global_[metric], 3)}")
    if metric and row.clients:
        found.append(f"held-out {metric} {number(row.clients[metric].mean, 3)}")
    return found


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
