"""Summary statistics over clients."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.messages import Score

LOWER_IS_BETTER = frozenset({"loss"})


@dataclass(frozen=True)
class Summary:
    """Statistics of one metric over clients."""

    mean: float
    """Mean over all held-out examples."""
    worst_decile: float
    """Mean over the bottom decile of the clients, at least one."""
    spread: float
    """Standard deviation over the clients."""
    each: Mapping[str, float]
    """Value of each client."""


def summary(scores: Mapping[str, Score]) -> dict[str, Summary]:
    """Summary of each metric."""
    names = next(iter(scores.values())).metrics if scores else {}
    return {
        name: _spread({client: score.metrics[name] for client, score in scores.items()}, scores, name) for name in names
    }


def _spread(each: Mapping[str, float], scores: Mapping[str, Score], name: str) -> Summary:
    examples = sum(score.examples for score in scores.values())
    worst_first = sorted(each.values(), reverse=name in LOWER_IS_BETTER)
    tenth = worst_first[: max(1, len(each) // 10)]
    center = sum(each.values()) / len(each)
    return Summary(
        mean=sum(each[client] * score.examples for client, score in scores.items()) / examples,
        worst_decile=sum(tenth) / len(tenth),
        spread=math.sqrt(sum((value - center) ** 2 for value in each.values()) / len(each)),
        each=dict(each),
    )
