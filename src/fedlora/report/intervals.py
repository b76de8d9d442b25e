"""95 % confidence intervals of a mean paired difference (docs/decisions/0034-comparison.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

_LEVEL = 0.95
_RESAMPLES = 10_000
_AT_ONCE = 1000  # resamples in memory, each with a number for every client

Clients = Mapping[str, tuple[float, float]]
"""The difference and the weight of each client in one seed."""


@dataclass(frozen=True)
class Interval:
    """The ends of an interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it is above 0, or all of it below."""
        return self.low > 0 or self.high < 0


def over_seeds(differences: Sequence[float]) -> Interval | None:
    """Student's t interval from the difference of each seed.

    None for one seed, and if the differences are all equal, which says nothing about how much they vary.
    """
    found, count = np.asarray(differences, float), len(differences)
    if count < 2 or not np.isfinite(found).all() or _equal(found):
        return None
    half = t.ppf((1 + _LEVEL) / 2, count - 1) * found.std(ddof=1) / np.sqrt(count)
    return Interval(float(found.mean() - half), float(found.mean() + half))


def over_seeds_and_clients(
    differences: Sequence[float], clients: Sequence[Clients], same_clients: bool, resamples: int = _RESAMPLES
) -> Interval | None:
    """The smallest interval that contains `over_seeds` and a hierarchical percentile bootstrap of seeds and clients.

    `differences` has the difference of each seed, as measured on the examples of all clients together; `clients` has those
    of each seed's clients, which are resampled with their weights. With `same_clients`, the clients are the same in all
    seeds, and are drawn once for all of them; otherwise, they are drawn anew in each. Percentiles are expanded for few
    clients (Hesterberg 2015, arXiv:1411.5279). For one seed, the interval is that of its clients alone. None if neither
    interval exists.
    """
    center, intervals = float(np.mean(differences)), [over_seeds(differences)]
    weight, weighted = _tables(clients)
    if weight.shape[1] >= 2 and np.isfinite(center):
        found = _resampled(weight, weighted, same_clients, resamples)
        tail = _expanded_tail(weight.shape[1])
        mean = np.mean(weighted.sum(1) / weight.sum(1))
        ends = center + np.nanquantile(found, (tail, 1 - tail)) - mean
        if not _equal(ends):
            intervals.append(Interval(*map(float, ends)))
    present = [one for one in intervals if one is not None]
    return Interval(min(one.low for one in present), max(one.high for one in present)) if present else None


def _equal(values: NDArray[np.float64]) -> bool:
    """Whether the values differ by rounding only."""
    return np.allclose(values, values[0], rtol=1e-6, atol=1e-9)


def _expanded_tail(count: int) -> float:
    """The tail of a percentile interval that is as wide as Student's t interval of so many normal values."""
    return float(norm.cdf(-np.sqrt(count / (count - 1)) * t.ppf((1 + _LEVEL) / 2, count - 1)))


def _tables(clients: Sequence[Clients]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights, and weights times differences [seeds, clients], both 0 for a client without a finite difference."""
    finite = [{name: pair for name, pair in each.items() if np.isfinite(pair[0])} for each in clients]
    finite = [each for each in finite if each]
    names = sorted({name for each in finite for name in each})
    pairs = np.array([[each.get(name, (0.0, 0.0)) for name in names] for each in finite], float)
    pairs = pairs.reshape(len(finite), len(names), 2)
    return pairs[..., 1], pairs[..., 0] * pairs[..., 1]


def _resampled(
    weight: NDArray[np.float64], weighted: NDArray[np.float64], same_clients: bool, resamples: int
) -> NDArray[np.float64]:
    """Means over resampled seeds of the weighted means over their resampled clients [resamples].

    NaN if the drawn clients are all missing from a drawn seed.
    """
    rng = np.random.default_rng(0)
    (seeds, clients), found = weight.shape, []
    for start in range(0, resamples, _AT_ONCE):
        size = min(_AT_ONCE, resamples - start)
        total = np.zeros(size)
        for place in range(seeds):
            if place == 0 or not same_clients:
                drawn = rng.multinomial(clients, np.full(clients, 1 / clients), size)  # [size, clients]
            seed = rng.integers(seeds, size=size)
            with np.errstate(invalid="ignore"):
                total += (drawn * weighted[seed]).sum(1) / (drawn * weight[seed]).sum(1)
        found.append(total / seeds)
    return np.concatenate(found)
