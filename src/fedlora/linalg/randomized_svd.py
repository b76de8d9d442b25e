"""Randomized decomposition of a sum of products from linear sketches of each product, so that only sums are needed.

    omega = gaussian_matrix(in_, width, rng)
    basis = range_basis(sum of w_i * first_sketch(f_i, omega))
    for each power iteration:
        omega = (sum of w_i * second_sketch(f_i, basis)).mT
        basis = range_basis(sum of w_i * first_sketch(f_i, omega))
    fit = fit_from_sketch(sum of w_i * second_sketch(f_i, basis), basis, rank)

The result is exact if `width` is at least the rank of the sum; otherwise its error approaches the minimum with the
number of power iterations.
Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.fit import Split, best_fit
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.subspace import orthonormal
from fedlora.linalg.weighted_terms import WORKING


def gaussian_matrix(
    in_: int, width: int, rng: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "in width"]:
    """The first test matrix: Gaussian columns."""
    return torch.randn(in_, width, generator=rng, device=rng.device, dtype=WORKING).to(dtype)


def first_sketch(factor: LowRank, omega: Float[Tensor, "*batch in width"]) -> Float[Tensor, "*batch out width"]:
    """The first sketch, b a omega."""
    return _apply(factor.b, factor.a, omega)


def range_basis(sketch: Float[Tensor, "*batch out width"]) -> Float[Tensor, "*batch out width"]:
    """The second test matrix: an orthonormal basis of the summed first sketches."""
    return orthonormal(sketch)


def second_sketch(factor: LowRank, basis: Float[Tensor, "*batch out width"]) -> Float[Tensor, "*batch width in"]:
    """The second sketch, basis^T b a."""
    return _apply(factor.a.mT, factor.b.mT, basis).transpose(-2, -1)


def fit_from_sketch(
    sketch: Float[Tensor, "*batch width in"], basis: Float[Tensor, "*batch out width"], rank: int, split: Split = "left"
) -> LowRank:
    """The best fit of rank `rank` to basis @ sketch, the projection of the sum onto the basis."""
    return best_fit([(1.0, LowRank(b=basis, a=sketch))], rank, split)


def _apply(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    return (left.to(WORKING) @ (right.to(WORKING) @ x.to(WORKING))).to(left.dtype)
