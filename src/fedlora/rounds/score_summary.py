"""Summary of the clients' scores."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from fedlora.messages import Statistics


@dataclass(frozen=True)
class Summary:
    """Statistics of one metric over clients. `worst_decile` and `spread` leave out clients for which it is undefined."""

    mean: float
    """The metric over the held-out examples of all clients together."""
    worst_decile: float
    """Mean over the bottom decile of the clients, at least one."""
    spread: float
    """Standard deviation over the clients."""
    each: Mapping[str, float]
    """Value of each client."""
    undefined: int | None = None
    """Number of clients for which the metric is undefined. Absent: none."""


def summary(
    scores: Iterable[tuple[str, Statistics]],
    metrics: Callable[[Statistics], Mapping[str, float]],
    lower_is_better: Collection[str],
) -> dict[str, Summary]:
    """Summary of each metric; `lower_is_better` has those of which smaller values are better.

    Of the clients' statistics, only the running sum is kept.
    """
    total: Statistics | None = None
    each: dict[str, Mapping[str, float]] = {}
    for client, found in scores:
        each[client] = metrics(found)
        total = found if total is None else total + found
    together = {} if total is None else metrics(total)
    return {
        name: _summary(value, {client: own[name] for client, own in each.items()}, name in lower_is_better)
        for name, value in together.items()
    }


def _summary(mean: float, each: Mapping[str, float], lower_is_better: bool) -> Summary:
    worst_first = sorted((value for value in each.values() if not math.isnan(value)), reverse=lower_is_better)
    undefined = len(each) - len(worst_first)
    if not worst_first:
        return Summary(mean, math.nan, math.nan, dict(each), undefined)
    tenth = worst_first[: max(1, len(worst_first) // 10)]
    center = sum(worst_first) / len(worst_first)
    return Summary(
        mean=mean,
        worst_decile=sum(tenth) / len(tenth),
        spread=math.sqrt(sum((value - center) ** 2 for value in worst_first) / len(worst_first)),
        each=dict(each),
        undefined=undefined or None,
    )
