"""Distances between Gaussian mixtures: optimal transport between components, then between mixtures."""

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.mixture import Mixtures, components
from fedlora.linalg.weighted_terms import WORKING


def gaussian_distances(
    means: Float[Tensor, "m width"],
    variances: Float[Tensor, "m width"],
    other_means: Float[Tensor, "n width"],
    other_variances: Float[Tensor, "n width"],
) -> Float[Tensor, "m n"]:
    """The squared 2-Wasserstein distances of diagonal Gaussians: |mean - mean'|^2 + |deviation - deviation'|^2, in fp64."""
    one = torch.cat([means.to(WORKING), variances.to(WORKING).sqrt()], 1)
    other = torch.cat([other_means.to(WORKING), other_variances.to(WORKING).sqrt()], 1)
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").square()


def transport_cost(mass: Float[Tensor, " m"], other: Float[Tensor, " n"], cost: Float[Tensor, "m n"]) -> float:
    """The minimal cost of transporting one mass distribution to the other, with `cost` per unit of mass; in fp64.

    Masses need not sum to 1: only their proportions count.
    """
    import ot  # it and scipy take a second to import

    masses = [(x.to(WORKING) / x.to(WORKING).sum()).numpy() for x in (mass, other)]
    return float(ot.emd2(*masses, cost.to(WORKING).numpy(), check_marginals=False))


def mixture_distance(one: Mixtures, other: Mixtures) -> float:
    """Optimal transport cost between two lists of groups.

    The cost per unit of mass is the transport cost between two groups' mixtures. A group's mass is its number of
    points, and costs are squared distances. Symmetric up to rounding; 0 for equal mixtures; infinite if one list has no
    mixture. Solves a small problem for each pair of groups.
    Source: Alvarez-Melis and Fusi 2020, arXiv:2002.02923, with mixtures of Gaussians in place of Gaussians.
    """
    if not len(one.weights) or not len(other.weights):
        return float("inf")
    cost = gaussian_distances(one.means, one.variances, other.means, other.variances)
    own, others, strips = _each(one.weights, one), _each(other.weights, other), _each(cost, one)
    between = [
        [transport_cost(v, w, block.mT) for w, block in zip(others, _each(strip.mT, other), strict=True)]
        for v, strip in zip(own, strips, strict=True)
    ]
    return transport_cost(_masses(one), _masses(other), torch.tensor(between, dtype=WORKING))


def _each(rows: Tensor, mixtures: Mixtures) -> tuple[Tensor, ...]:
    """The rows of the components, as one tensor for each group that has any."""
    return torch.split(rows, [size for size in components(mixtures.counts).tolist() if size])


def _masses(mixtures: Mixtures) -> Tensor:
    """The number of points of each group that has a mixture."""
    return mixtures.counts[components(mixtures.counts) > 0].to(WORKING)
