"""Clusters of vectors by their directions: average linkage, and as many clusters as the silhouette says."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.weighted_terms import WORKING


def directions(rows: Float[Tensor, "items size"]) -> Float[Tensor, "items size"]:
    """Each row divided by its norm, in fp64; a row of zeros has no direction and stays."""
    wide = rows.to(WORKING)
    norms = wide.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, wide / norms.clamp_min(1e-300), 0.0)


def distances(
    left: Sequence[Float[Tensor, "items _"]], right: Sequence[Float[Tensor, "others _"]]
) -> Float[Tensor, "items others"]:
    """1 - the mean over several blocks of the inner products: of directions, the mean of 1 - cosine, in [0, 2].

    An item without a direction has distance 1 to all. The distance from a mean of directions is the mean of the distances.
    """
    products = torch.stack([x @ y.mT for x, y in zip(left, right, strict=True)])
    return (1 - products.mean(0)).clamp(0, 2)


def pairwise(blocks: Sequence[Float[Tensor, "items _"]]) -> Float[Tensor, "items items"]:
    """The `distances` between all items: symmetric, with zeros on the diagonal."""
    found = distances(blocks, blocks)
    return ((found + found.mT) / 2).fill_diagonal_(0)


def clusters(apart: Float[Tensor, "items items"], most: int, count: int = 0) -> list[int]:
    """Each item's cluster, numbered in the order of their first items, from average linkage on the distances.

    There are `count` clusters (at most one for each item); if that is 0, the number from 2 to `most` with the largest mean
    silhouette, the smallest such. A silhouette needs fewer clusters than items: two items are one cluster.
    """
    items = len(apart)
    if count or min(most, items - 1) < 2:
        return _linked(apart, max(1, min(count, items)))
    divisions = [_linked(apart, k) for k in range(2, min(most, items - 1) + 1)]
    return max(divisions, key=lambda labels: silhouette(apart, labels))


def silhouette(apart: Float[Tensor, "items items"], labels: Sequence[int]) -> float:
    """The mean over items of (v - u) / max(u, v), in [-1, 1]: u, v the mean distances to its own and the next cluster.

    0 where all items are one cluster, or each its own.
    """
    if not 1 < len(set(labels)) < len(labels):
        return 0.0
    from sklearn.metrics import silhouette_score  # takes a second to import

    return float(silhouette_score(apart.numpy(), labels, metric="precomputed"))


def _linked(apart: Tensor, count: int) -> list[int]:
    if count == 1:
        return [0] * len(apart)
    from sklearn.cluster import AgglomerativeClustering  # takes a second to import

    found = AgglomerativeClustering(count, metric="precomputed", linkage="average").fit_predict(apart.numpy()).tolist()
    numbers = {label: i for i, label in enumerate(dict.fromkeys(found))}
    return [numbers[label] for label in found]
