"""Summary of the clients' scores."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedlora.messages import Statistics

LOWER_IS_BETTER = frozenset({"loss"})


@dataclass(frozen=True)
class Summary:
    """Statistics of one metric over clients."""

    mean: float
    """The metric over the held-out examples of all clients together."""
    worst_decile: float
    """Mean over the bottom decile of the clients, at least one."""
    spread: float
    """Standard deviation over the clients."""
    each: Mapping[str, float]
    """Value of each client."""


def summary(
    scores: Iterable[tuple[str, Statistics]], metrics: Callable[[Statistics], Mapping[str, float]]
) -> dict[str, Summary]:
    """Summary of each metric. Of the clients' statistics, only the running sum is kept."""
    total: Statistics | None = None
    each: dict[str, Mapping[str, float]] = {}
    for client, found in scores:
        each[client] = metrics(found)
        total = found if total is None else total + found
    together = {} if total is None else metrics(total)
    return {
        name: _summary(value, {client: own[name] for client, own in each.items()}, name in LOWER_IS_BETTER)
        for name, value in together.items()
    }


def _summary(mean: float, each: Mapping[str, float], lower_is_better: bool) -> Summary:
    worst_first = sorted(each.values(), reverse=lower_is_better)
    tenth = worst_first[: max(1, len(each) // 10)]
    center = sum(each.values()) / len(each)
    return Summary(
        mean=mean,
        worst_decile=sum(tenth) / len(tenth),
        spread=math.sqrt(sum((value - center) ** 2 for value in each.values()) / len(each)),
        each=dict(each),
    )
