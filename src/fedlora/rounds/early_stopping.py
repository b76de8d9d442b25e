"""The best round of a run by a metric on the clients' held-out examples, and the end of a run that no longer improves."""

import math
from collections.abc import Collection, Sequence

from fedlora.rounds.row import RoundRow


def best_round(rows: Sequence[RoundRow], metric: str, lower_is_better: Collection[str]) -> int | None:
    """The first round with the best `evaluate.metric`, among them that before training; None if all values are NaN.

    `lower_is_better` has the names of the metrics of which smaller values are better.
    """
    sign = -1 if metric.split(".")[1] in lower_is_better else 1
    values = {row.round: sign * _value(row, metric) for row in rows if row.clients}
    finite = {number: value for number, value in values.items() if not math.isnan(value)}
    return max(finite, key=lambda number: (finite[number], -number)) if finite else None


def stops(rows: Sequence[RoundRow], stop_after: int | None) -> bool:
    """Whether the run ends, since the last `stop_after` evaluations have not improved the metric; never, if it is None."""
    if stop_after is None or not rows:
        return False
    best = rows[-1].best_round
    since = [row for row in rows if row.clients and (best is None or row.round > best)]
    return len(since) >= stop_after


def until_best(rows: Sequence[RoundRow]) -> list[RoundRow]:
    """The rows up to that of the round whose adapter is exported: the best one, else the last."""
    best = rows[-1].best_round if rows else None
    return [row for row in rows if best is None or row.round <= best]


def _value(row: RoundRow, metric: str) -> float:
    _, name, statistic = metric.split(".")
    return float(getattr((row.clients or {})[name], statistic))
