"""Gaussian mixtures that summarize labeled points."""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

COMPONENTS = 3
"""Maximum number of components of a group's mixture; it has at most as many as the group has points."""


@dataclass(frozen=True)
class Mixtures:
    """Diagonal Gaussian mixtures, one for each group of two points or more.

    `counts` are the numbers of points of all groups; the other fields hold `components(counts)` rows for each group,
    concatenated.
    """

    counts: Int[Tensor, " groups"]
    weights: Float[Tensor, " components"]
    means: Float[Tensor, "components width"]
    variances: Float[Tensor, "components width"]


def components(counts: Int[Tensor, " groups"]) -> Int[Tensor, " groups"]:
    """The number of components of the mixtures of groups with these numbers of points.

    >>> components(torch.tensor([0, 1, 2, 50])).tolist()
    [0, 0, 2, 3]
    """
    return counts.clamp(max=COMPONENTS).where(counts > 1, 0)


def fit_mixtures(points: Float[Tensor, "points width"], groups: Int[Tensor, " points"], count: int, seed: int) -> Mixtures:
    """Mixtures for groups 0, ..., `count` - 1, fitted by expectation maximization from a k-means start.

    Settings are those of the released code of CE-LoRA (arXiv:2503.23869): diagonal, 1e-5 added to variances, at most
    200 steps. The mixture of a group of at most three points has each point as a mean, and hence reveals the points.
    """
    from sklearn.exceptions import ConvergenceWarning  # takes a second to import
    from sklearn.mixture import GaussianMixture

    counts = torch.bincount(groups, minlength=count)
    weights, means, variances = [points.new_zeros(0)], [points[:0]], [points[:0]]
    for group, size in enumerate(components(counts).tolist()):
        if size:
            model = GaussianMixture(size, covariance_type="diag", reg_covar=1e-5, max_iter=200, random_state=seed % 2**32)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # after 200 steps, or for equal points
                model.fit(points[groups == group].double().numpy())
            weights.append(torch.from_numpy(model.weights_).to(points.dtype))
            means.append(torch.from_numpy(model.means_).to(points.dtype))
            variances.append(torch.from_numpy(model.covariances_).to(points.dtype))
    return Mixtures(counts, torch.cat(weights), torch.cat(means), torch.cat(variances))


def validation_error(mixtures: Mixtures) -> str | None:
    """Why untrusted tensors are not valid mixtures; None if they are. NaN is not checked."""
    each, masses = components(mixtures.counts), torch.zeros(len(mixtures.counts), dtype=mixtures.weights.dtype)
    masses = masses.index_add(0, torch.repeat_interleave(each), mixtures.weights)
    if bool((mixtures.weights < 0).any()) or bool(((masses - (each > 0).to(masses)).abs() > 1e-3).any()):
        return "weights that are negative or do not add up to 1 for each class"
    return "negative variances" if bool((mixtures.variances < 0).any()) else None
