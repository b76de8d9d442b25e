"""What a person sees: live progress, the closing table, and the tables of the other commands."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedlora import pages
from fedlora.data.partition import label_table
from fedlora.experiment import Problem, Result
from fedlora.messages import ClientInfo, Round
from fedlora.methods import Row

_FEW_LABELS = 20
CLIENTS_WIDTH = 120
"""Columns that the table of clients may take, so that all its numbers can be read."""


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
    """The run, a line for each round. Held-out examples are the clients'; the worst tenth is of the clients."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    first = ("", "", "train", "test", "held-out", "worst", "", "", "")
    second = ("round", "clients", "loss", "accuracy", "accuracy", "tenth", "up", "down", "seconds")
    for above, below in zip(first, second, strict=True):
        table.add_column(f"{above}\n{below}", justify="right")
    for row in result.rows:
        clients = row.get("clients", {}).get("accuracy", {})
        table.add_row(
            str(row["round"]),
            str(len(row["accepted"])) + (f" of {len(row['chosen'])}" if row["refused"] else ""),
            _number(row["train_loss"]),
            _number(row.get("global", {}).get("accuracy")),
            _number(clients.get("mean")),
            _number(clients.get("worst_decile")),
            size(row["bytes_up"]),
            size(row["bytes_down"]),
            f"{sum(row['seconds'].values()):.1f}",
        )
    return table


def methods(rows: Iterable[Row]) -> Group:
    """What each method does and needs, in few lines."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0, leading=1)
    for title in ("method", "exact", "floats of a\nlayer up,\nand down", "unequal\nranks", "per-\nsonal"):
        table.add_column(title, min_width=16 if title == "method" else None, max_width=11 if title == "exact" else None)
    for title in ("single\nuploads", "secure\nsums", "DP"):
        table.add_column(title, max_width=7)
    for row in rows:
        up, down = (" then ".join(formulas) for formulas in (row.up, row.down))
        authors, _, number = row.paper.rpartition(", ")
        table.add_row(
            Text.assemble((row.name, "bold"), f"\n{authors}\n{number}"),
            pages.short(row.exact),
            f"{up}\n{down}",
            *map(pages.yes, (row.mixed_ranks, row.personal, row.singles)),
            *map(pages.short, (row.secure_sums(), row.private)),
        )
    return Group(table, Text("All about one of them: fedlora methods NAME"))


def method(row: Row) -> Markdown:
    """The method's page."""
    return Markdown(pages.page(row))


def clients(problem: Problem) -> Group:
    """Each client's rank, sizes and labels: the count of every label if they are few, else of the most frequent."""
    labels, division = problem.corpus.labels, problem.division
    counts = label_table(problem.corpus.train, division, len(labels))
    few = len(labels) <= _FEW_LABELS
    title = f"{len(problem.members)} clients, {len(problem.corpus.test)} test examples"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("client", "rank", "train", "held out", *(map(str, range(len(labels))) if few else ("labels",))):
        table.add_column(name, justify="right")
    if not few:
        table.add_column("most frequent", overflow="fold")
    for who, share, own in zip(problem.members, division.shares, counts.tolist(), strict=True):
        ranked = sorted(range(len(labels)), key=lambda label: -own[label])
        top = ", ".join(f"{labels[label]} {own[label]}" for label in ranked[:3] if own[label])
        cells = map(str, own) if few else (str(sum(count > 0 for count in own)), top)
        table.add_row(who.id, str(who.rank), str(len(share.train)), str(len(share.held_out)), *cells)
    below = [Text("labels: " + ", ".join(f"{i} {name}" for i, name in enumerate(labels)))] if few else []
    if division.left_out_rows:
        below.append(Text(f"left out: {division.left_out_rows} examples, {division.left_out_clients} clients"))
    return Group(table, *below)


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
        found.append(f"held-out accuracy {row['clients']['accuracy']['mean']:.3f}")
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
