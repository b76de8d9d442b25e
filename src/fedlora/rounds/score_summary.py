"""Summary statistics over clients."""

import math
from collections.abc import Mapping
from typing import Any

from fedlora.messages import Score

LOWER_IS_BETTER = frozenset({"loss"})


def summary(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """Statistics of each metric: `mean`, `worst_decile`, `spread`, and `each` client's value.

    `mean` is over all held-out examples, `worst_decile` over the bottom decile of the clients (at least one), and
    `spread` is the standard deviation over clients.
    """
    names = next(iter(scores.values())).metrics if scores else {}
    return {
        name: _spread({client: score.metrics[name] for client, score in scores.items()}, scores, name) for name in names
    }


def _spread(each: Mapping[str, float], scores: Mapping[str, Score], name: str) -> dict[str, Any]:
    examples = sum(score.examples for score in scores.values())
    worst_first = sorted(each.values(), reverse=name in LOWER_IS_BETTER)
    tenth = worst_first[: max(1, len(each) // 10)]
    center = sum(each.values()) / len(each)
    return {
        "mean": sum(each[client] * score.examples for client, score in scores.items()) / examples,
        "worst_decile": sum(tenth) / len(tenth),
        "spread": math.sqrt(sum((value - center) ** 2 for value in each.values()) / len(each)),
        "each": dict(each),
    }
