"""Correlation of predictions with scores."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def pearson(count: int, sums: Mapping[str, Tensor]) -> float:
    """The Pearson correlation from the sums `x`, `y`, `xx`, `yy` and `xy` of two quantities, in fp64.

    NaN if one of them is constant: if its variance is less than the rounding errors of its sums. These are small if a
    constant near the values was subtracted before they were summed.
    """
    x, y, xx, yy, xy = (float(sums[name]) for name in ("x", "y", "xx", "yy", "xy"))
    spread_x, spread_y = (_spread(count, *of) for of in ((x, xx), (y, yy)))
    if not (spread_x > 0 and spread_y > 0):
        return math.nan
    return min(1.0, max(-1.0, (xy - x * y / count) / math.sqrt(spread_x) / math.sqrt(spread_y)))


def spearman(x: Float[Tensor, " rows"], y: Float[Tensor, " rows"]) -> float:
    """Spearman's rank correlation, with mean ranks for ties; NaN if x or y is constant."""
    ranks = [_ranks(values) for values in (x, y)]
    a, b = (rank - rank.mean() for rank in ranks)
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else math.nan


def _spread(count: int, total: float, squares: float) -> float:
    """The sum of squared deviations from the mean; 0 if it cannot be told from rounding errors."""
    spread = squares - total * total / count
    return spread if spread > count * torch.finfo(torch.float64).eps * squares else 0.0


def _ranks(values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """The rank of each value, in fp64; equal values have the mean of their ranks."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = (sizes.cumsum(0) - (sizes - 1) / 2).double()[group]
    return ranks
