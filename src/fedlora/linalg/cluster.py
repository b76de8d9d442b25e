"""Clustering of vectors by direction: average linkage, with the number of clusters chosen by the silhouette."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.weighted_terms import WORKING


def directions(rows: Float[Tensor, "items size"]) -> Float[Tensor, "items size"]:
    """Each row divided by its norm, in fp64; a row of zeros has no direction and stays zero."""
    fp64 = rows.to(WORKING)
    norms = fp64.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, fp64 / norms.clamp_min(1e-300), 0.0)


def distances(
    left: Sequence[Float[Tensor, "items _"]], right: Sequence[Float[Tensor, "others _"]]
) -> Float[Tensor, "items others"]:
    """1 minus the mean over the blocks of the inner products; for directions this is the mean of 1 - cosine, in [0, 2].

    An item without a direction has distance 1 to all others. The distance to a mean of directions is the mean distance.
    """
    products = torch.stack([x @ y.mT for x, y in zip(left, right, strict=True)])
    return (1 - products.mean(0)).clamp(0, 2)


def pairwise(blocks: Sequence[Float[Tensor, "items _"]]) -> Float[Tensor, "items items"]:
    """The `distances` between all items: symmetric, with zeros on the diagonal."""
    found = distances(blocks, blocks)
    return ((found + found.mT) / 2).fill_diagonal_(0)


def clusters(distance_matrix: Float[Tensor, "items items"], max_count: int, count: int = 0) -> list[int]:
    """Each item's cluster from average linkage on the distances, numbered in the order of the clusters' first items.

    There are `count` clusters, at most one for each item. If `count` is 0, the number is the one from 2 to `max_count`
    with the largest mean silhouette, or the smallest such number. The silhouette is defined for fewer clusters than items,
    so two items form one cluster.
    """
    items = len(distance_matrix)
    if count or min(max_count, items - 1) < 2:
        return _linked(distance_matrix, max(1, min(count, items)))
    divisions = [_linked(distance_matrix, k) for k in range(2, min(max_count, items - 1) + 1)]
    return max(divisions, key=lambda labels: silhouette(distance_matrix, labels))


def silhouette(distance_matrix: Float[Tensor, "items items"], labels: Sequence[int]) -> float:
    """The mean silhouette coefficient, in [-1, 1]; 0 if there is one cluster, or one for each item.

    The coefficient of an item is (v - u) / max(u, v), with its mean distances u to its own and v to the nearest other
    cluster.
    """
    if not 1 < len(set(labels)) < len(labels):
        return 0.0
    from sklearn.metrics import silhouette_score  # takes a second to import

    return float(silhouette_score(distance_matrix.numpy(), labels, metric="precomputed"))


def _linked(distance_matrix: Tensor, count: int) -> list[int]:
    if count == 1:
        return [0] * len(distance_matrix)
    from sklearn.cluster import AgglomerativeClustering  # takes a second to import

    found = (
        AgglomerativeClustering(count, metric="precomputed", linkage="average")
        .fit_predict(distance_matrix.numpy())
        .tolist()
    )
    numbers = {label: i for i, label in enumerate(dict.fromkeys(found))}
    return [numbers[label] for label in found]
