"""K-means, and agreement of its groups with known groups."""

import warnings
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedlora.linalg.weighted_terms import WORKING


def embedded(parts: Iterable[Float[Tensor, "points _"]]) -> Float[Tensor, "points points"]:
    """Points with the same pairwise distances as the given ones, in at most as many dimensions as there are points.

    `parts` are the coordinates of the given points. K-means and silhouettes depend only on distances. Needs one pass
    over the coordinates, O(points^2 coordinates), in fp64.
    """
    gram = torch.zeros((), dtype=WORKING)
    for x in parts:
        centered = x.to(WORKING) - x.to(WORKING).mean(0)
        gram = gram + centered @ centered.mT
    values, vectors = torch.linalg.eigh(gram)
    points: Tensor = vectors * values.clamp(min=0).sqrt()
    return points


def kmeans(points: Float[Tensor, "points width"], groups: int, seed: int) -> Int[Tensor, " points"]:
    """Each point's group, from the best of ten runs of k-means with k-means++; groups are numbered by first occurrence.

    Equal points may give fewer groups than requested; with no more points than groups, each point is its own group.
    """
    from sklearn.cluster import KMeans  # takes a second to import
    from sklearn.exceptions import ConvergenceWarning

    if len(points) <= groups:
        return torch.arange(len(points))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than groups
        found = KMeans(groups, n_init=10, tol=0.0, random_state=seed % 2**32).fit_predict(points.numpy())
    names = {label: i for i, label in enumerate(dict.fromkeys(found.tolist()))}
    return torch.tensor([names[label] for label in found.tolist()])


def agreement(groups: Int[Tensor, " points"], known: Int[Tensor, " points"]) -> float:
    """The fraction of points in the right group, under the best one-to-one assignment of groups to known groups."""
    from scipy.optimize import linear_sum_assignment  # takes a second to import

    table = torch.zeros(int(groups.max()) + 1, int(known.max()) + 1)
    table.index_put_((groups, known), torch.ones(len(groups)), accumulate=True)
    return float(table[linear_sum_assignment(table.numpy(), maximize=True)].sum()) / len(groups)
