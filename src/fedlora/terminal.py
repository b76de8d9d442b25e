"""What a person sees: live progress, the closing table, and the tables of the other commands."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedlora.experiment import Problem, Result
from fedlora.messages import ClientInfo, Round
from fedlora.methods import Row

_FEW_LABELS = 12


class Live:
    """A bar for the round in progress, and a line for each that is complete."""

    def __init__(self, console: Console, rounds: int) -> None:
        self._console, self._rounds = console, rounds
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("clients"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._task = self._bar.add_task("loading", total=None)

    def __enter__(self) -> "Live":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """Empties the bar."""
        again = f", attempt {rnd.attempt + 1}" if rnd.attempt else ""
        name = f"round {rnd.index + 1}/{self._rounds}{again}"
        self._bar.reset(self._task, total=len(chosen), description=name)

    def answered(self, who: ClientInfo, refused: str | None) -> None:
        """Moves the bar by one client; names a client that is refused."""
        self._bar.advance(self._task)
        if refused is not None:
            self._console.print(f"client {who.id} refused: {refused}", style="yellow", markup=False, highlight=False)

    def round_ended(self, row: Mapping[str, Any]) -> None:
        """One line of the round's main numbers."""
        seconds = sum(row["seconds"].values())
        parts = [f"round {row['round']}/{self._rounds}", f"loss {row['train_loss']:.3f}", *_scores(row), f"{seconds:.1f} s"]
        self._console.print("  ".join(parts), highlight=False)


def closing(result: Result) -> Table:
    """The run, a line for each round."""
    table = Table(title=f"{result.folder}", title_justify="left")
    for name in (
        "round",
        "clients",
        "train loss",
        "test accuracy",
        "clients' accuracy",
        "worst tenth",
        "up",
        "down",
        "seconds",
    ):
        table.add_column(name, justify="right")
    for row in result.rows:
        clients = row.get("clients", {}).get("accuracy", {})
        table.add_row(
            str(row["round"]),
            str(len(row["accepted"])) + (f" of {len(row['chosen'])}" if row["refused"] else ""),
            f"{row['train_loss']:.3f}",
            _number(row.get("global", {}).get("accuracy")),
            _number(clients.get("mean")),
            _number(clients.get("worst_decile")),
            size(row["bytes_up"]),
            size(row["bytes_down"]),
            f"{sum(row['seconds'].values()):.1f}",
        )
    return table


def methods(rows: Iterable[Row]) -> Table:
    """A few lines for each method."""
    table = Table.grid(padding=(0, 2, 1, 0))
    for row in rows:
        settings = ", ".join(f"{key} = {value!r}" for key, value in row.settings().items())
        facts = [
            f"{row.summary}",
            f"{row.paper}",
            f"exact mean: {row.exact}",
            f"mixed ranks: {_yes(row.mixed_ranks)}; personal: {_yes(row.personal)}; head: {row.head}",
            f"floats per layer and round: up {', then '.join(row.up)}; down {', then '.join(row.down)}",
            f"settings: {settings}",
        ]
        table.add_row(Text(row.name, style="bold"), Text("\n".join(facts)))
    return table


def clients(problem: Problem) -> Table:
    """Each client's rank, sizes and labels: all labels if they are few, else the most frequent."""
    labels, targets = problem.corpus.labels, problem.corpus.train["label"]
    few = len(labels) <= _FEW_LABELS
    table = Table(title=f"{len(problem.members)} clients, {len(problem.corpus.test)} test examples", title_justify="left")
    for name in ("client", "rank", "train", "held out", *(labels if few else ("labels", "most frequent"))):
        table.add_column(name, justify="left" if name in ("client", "most frequent") else "right", overflow="fold")
    for who, share in zip(problem.members, problem.division.shares, strict=True):
        counts = Counter(int(targets[int(row)]) for row in (*share.train, *share.held_out))
        top = ", ".join(f"{labels[label]} {count}" for label, count in counts.most_common(3))
        cells = [str(counts.get(i, 0)) for i in range(len(labels))] if few else [str(len(counts)), top]
        table.add_row(who.id, str(who.rank), str(len(share.train)), str(len(share.held_out)), *cells)
    return table


def size(count: int) -> str:
    """A number of bytes for people, in powers of 1000."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _scores(row: Mapping[str, Any]) -> list[str]:
    found = []
    if "global" in row:
        found.append(f"test accuracy {row['global']['accuracy']:.3f}")
    if row.get("clients"):
        found.append(f"clients' accuracy {row['clients']['accuracy']['mean']:.3f}")
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
