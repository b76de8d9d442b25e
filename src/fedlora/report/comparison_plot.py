"""Plot of a metric by round."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedlora.rounds.row import RoundRow
from fedlora.runs.result import package
from fedlora.runs.saved_run import SavedRun


def plot(cases: Mapping[str, Mapping[int, SavedRun]], metric: str) -> Any:
    """New axes with the mean of each case by round, and a band of one standard deviation over its seeds.

    The values are those of the test set, or, if no run has them, those of the held-out examples.

    Raises:
        UserError: matplotlib is not installed.
    """
    axes = package("matplotlib.pyplot").subplots()[1]
    test = any(_of_test(row, metric) is not None for runs in cases.values() for run in runs.values() for row in run.rows)
    value = _of_test if test else _held_out
    for label, runs in cases.items():
        by_round: dict[int, list[float]] = {}
        for run in runs.values():
            for row in run.rows:
                if (found := value(row, metric)) is not None:
                    by_round.setdefault(row.round, []).append(found)
        complete = {number: found for number, found in by_round.items() if len(found) == len(runs)}
        if not complete:
            continue
        mean = np.array([np.mean(found) for found in complete.values()])
        (line,) = axes.plot(list(complete), mean, "o-", label=label)
        if len(runs) > 1:
            std = np.array([np.std(found, ddof=1) for found in complete.values()])
            axes.fill_between(list(complete), mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="round", ylabel=f"{'test' if test else 'held-out'} {metric}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return axes


def _of_test(row: RoundRow, metric: str) -> float | None:
    return None if row.global_ is None else row.global_.get(metric)


def _held_out(row: RoundRow, metric: str) -> float | None:
    return None if row.clients is None or metric not in row.clients else row.clients[metric].mean
