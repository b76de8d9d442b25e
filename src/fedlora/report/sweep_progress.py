"""Terminal output of a sweep: a table of its points, or one line for each run."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedlora.printable import number, printable
from fedlora.rounds.row import RoundRow
from fedlora.runs.sweep_plan import Outcome, Outcomes, PlannedRun, SweepPlan


@runtime_checkable
class SweepProgress(Protocol):
    """Callbacks for the progress of a sweep."""

    def round_ended(self, run: PlannedRun, row: RoundRow) -> None:
        """Called with each row of a run."""

    def run_ended(self, run: PlannedRun, outcome: Outcome) -> None:
        """Called when a run has ended, also if it has failed."""


class NullSweepProgress:
    """Ignores all progress."""

    def round_ended(self, run: PlannedRun, row: RoundRow) -> None:
        """Does nothing."""

    def run_ended(self, run: PlannedRun, outcome: Outcome) -> None:
        """Does nothing."""


class SweepLines:
    """One line for each run that has ended."""

    def __init__(self, console: Console, plan: SweepPlan, outcomes: Outcomes) -> None:
        self._console, self._plan, self._outcomes, self._started = console, plan, dict(outcomes), time.monotonic()
        self._before = len(outcomes)
        self._last: dict[str, RoundRow] = {}

    def round_ended(self, run: PlannedRun, row: RoundRow) -> None:
        """Keeps the row."""
        self._last[run.name] = row

    def run_ended(self, run: PlannedRun, outcome: Outcome) -> None:
        """Prints the number of runs done, the run, and its last scores or the reason of its failure."""
        self._outcomes[run.name] = outcome
        row = self._last.pop(run.name, None)
        end = f"failed: {outcome.failed}" if outcome.failed is not None else _scores(row)
        line = f"{self.overall()}  {run.title}: {end}"
        self._console.print(Text(printable(line), "red" if outcome.failed is not None else ""), soft_wrap=True)

    def overall(self) -> str:
        """Runs that have ended, and the estimated time left."""
        total = sum(map(self._plan.count, range(len(self._plan.sweep.points))))
        ended, new = len(self._outcomes), len(self._outcomes) - self._before
        left = (time.monotonic() - self._started) / new * (total - ended) if new else None
        return f"{ended}/{total} runs" + ("" if left is None or ended >= total else f", {_duration(left)} left")


class SweepTable(SweepLines):
    """A live table with a row for each point; failures are also printed above it."""

    def __init__(self, console: Console, plan: SweepPlan, outcomes: Outcomes) -> None:
        super().__init__(console, plan, outcomes)
        self._current: dict[int, tuple[PlannedRun, RoundRow]] = {}
        self._live = Live(console=console, get_renderable=self.table, refresh_per_second=2)

    def __enter__(self) -> "SweepTable":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def round_ended(self, run: PlannedRun, row: RoundRow) -> None:
        """Shows the row in its point's line."""
        self._current[run.point] = run, row

    def run_ended(self, run: PlannedRun, outcome: Outcome) -> None:
        """Counts the run; prints the reason of its failure."""
        self._outcomes[run.name] = outcome
        if outcome.failed is not None:
            self._console.print(Text(printable(f"{run.title} failed: {outcome.failed}"), "red"), soft_wrap=True)

    def table(self) -> Group:
        """The table in its current state."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("point", "runs", "round", "last scores", "failed"):
            table.add_column(name, justify="right" if name in ("runs", "round", "failed") else "left")
        for i, point in enumerate(self._plan.sweep.points):
            ended = list(self._plan.ended(i, self._outcomes))
            failed = sum(one.failed is not None for one in ended)
            run, row = self._current.get(i, (None, None))
            at = "" if run is None or row is None else f"{row.round}/{run.experiment.rounds}"
            table.add_row(
                Text(printable(point.label)),
                f"{len(ended)}/{self._plan.count(i)}",
                at,
                _scores(row),
                Text(str(failed) if failed else "", "red"),
            )
        return Group(table, Text(self.overall()))


@contextmanager
def shown_sweep(plan: SweepPlan, outcomes: Outcomes, progress: bool | SweepProgress) -> Iterator[SweepProgress]:
    """Returns the given callbacks; for True, a live table if standard output is a terminal or a notebook, else nothing."""
    console = Console()
    if not isinstance(progress, bool):
        yield progress
    elif progress and (console.is_jupyter or sys.stdout.isatty()):
        with SweepTable(console, plan, outcomes) as table:
            yield table
    else:
        yield NullSweepProgress()


def _scores(row: RoundRow | None) -> str:
    if row is None:
        return ""
    if row.clients and (metric := row.main_metric):
        return f"held-out {metric} {number(row.clients[metric].mean, 3)}"
    return "" if row.train_loss is None else f"training loss {row.train_loss:.3f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "less than a minute"
    )
