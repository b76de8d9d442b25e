"""K-means, and how far its groups agree with groups that are known."""

import warnings
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedlora.linalg.weighted_terms import WORKING


def embedded(parts: Iterable[Float[Tensor, "points _"]]) -> Float[Tensor, "points points"]:
    """Points as far from each other as the given ones, which come in parts, in no more dimensions than there are points.

    K-means and silhouettes depend on distances alone. One pass over the numbers, O(points^2 numbers), in fp64.
    """
    gram = torch.zeros((), dtype=WORKING)
    for x in parts:
        centred = x.to(WORKING) - x.to(WORKING).mean(0)
        gram = gram + centred @ centred.mT
    values, vectors = torch.linalg.eigh(gram)
    points: Tensor = vectors * values.clamp(min=0).sqrt()
    return points


def kmeans(points: Float[Tensor, "points width"], groups: int, seed: int) -> Int[Tensor, " points"]:
    """Each point's group, by the best of ten runs from k-means++; groups are numbered as they first occur.

    Fewer groups than points come out where points are equal; each point is its own where there are no more points.
    """
    from sklearn.cluster import KMeans  # takes a second to import
    from sklearn.exceptions import ConvergenceWarning

    if len(points) <= groups:
        return torch.arange(len(points))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than groups
        found = KMeans(groups, n_init=10, tol=0.0, random_state=seed % 2**32).fit_predict(points.numpy())
    names = {label: i for i, label in enumerate(dict.fromkeys(found.tolist()))}
    return torch.tensor([names[label] for label in found.tolist()])


def agreement(groups: Int[Tensor, " points"], known: Int[Tensor, " points"]) -> float:
    """The part of the points whose group is the known one, if groups are named as well as possible, one name for each."""
    from scipy.optimize import linear_sum_assignment  # takes a second to import

    table = torch.zeros(int(groups.max()) + 1, int(known.max()) + 1)
    table.index_put_((groups, known), torch.ones(len(groups)), accumulate=True)
    return float(table[linear_sum_assignment(table.numpy(), maximize=True)].sum()) / len(groups)
