"""The figures of a run that are compared, and their mean over seeds."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.report.intervals import Interval
from fedlora.rounds.row import RoundRow
from fedlora.runs.saved_run import SavedRun
from fedlora.tasks.table import task_of


@dataclass(frozen=True)
class Difference:
    """The mean of the paired differences to the baseline over the seeds of both, and its interval, if it has one."""

    seeds: int
    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Figure:
    """Mean and standard deviation over the seeds; for one seed, there is no deviation."""

    mean: float
    std: float | None
    difference: Difference | None = None


@dataclass(frozen=True)
class ComparedCase:
    """The finished run of each seed of a case, the figures of all of them, and the settings that a search chose."""

    label: str
    runs: Mapping[int, SavedRun]
    figures: Mapping[str, Figure]
    chosen: Mapping[str, Any]


def lower_is_better(run: SavedRun) -> Collection[str]:
    """Metrics of the run's task of which smaller values are better."""
    return task_of(dict(run.experiment.task)).lower_is_better


def metrics(row: RoundRow) -> list[str]:
    """Names of the metrics of a row, the task's main metric first."""
    return [name for name in {**(row.clients or {}), **(row.global_ or {})} if name != "examples"]


def figures(run: SavedRun) -> dict[str, float]:
    """Scores of the result, after the last round or the best one, under the keys of docs/rounds.md; costs of all rounds.

    `clients.METRIC.variance` is the variance over the clients. Figures that the run does not have are left out.
    """
    last, found = run.final, {}
    test, clients = last.global_ or {}, last.clients or {}
    for name in metrics(last):
        if name in test:
            found[f"global.{name}"] = float(test[name])
        if name in clients:
            own = clients[name]
            found[f"clients.{name}.mean"] = own.mean
            found[f"clients.{name}.worst_decile"] = own.worst_decile
            found[f"clients.{name}.variance"] = own.spread**2
    errors = [row.aggregation_error for row in run.rows if row.aggregation_error is not None]
    if errors:
        found["aggregation_error"] = sum(errors) / len(errors)
    found["bytes_up"] = float(sum(row.bytes_up for row in run.rows))
    found["bytes_down"] = float(sum(row.bytes_down for row in run.rows))
    found["seconds"] = sum(row.seconds.total for row in run.rows)
    return found


def over_seeds(values: Mapping[int, float]) -> Figure:
    """Mean and standard deviation of the values of some seeds."""
    found = np.array(list(values.values()))
    return Figure(float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else None)
