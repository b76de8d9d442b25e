"""Robust PCA: decomposition of columns into a low-rank and a sparse part."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.weighted_terms import WORKING


@dataclass(frozen=True)
class Parts:
    """Two matrices whose sum is the given one, within the solver's tolerance."""

    low: Float[Tensor, "*batch n m"]
    sparse: Float[Tensor, "*batch n m"]


def robust_pca(
    columns: Float[Tensor, "*batch n m"], sparsity: float | None = None, tolerance: float = 1e-7, steps: int = 1000
) -> Parts:
    """The parts that minimize |low|_nuclear + sparsity |sparse|_1, by alternating directions (ADMM).

    `sparsity` defaults to 1/sqrt(max(n, m)). Stops at |columns - low - sparse| <= tolerance |columns|, or after
    `steps`. A step costs O(n m^2). Synchronizes with the device every ten steps. With few columns, or dense noise, most
    of the matrix is in the sparse part; callers should check its density.
    Source: Candes, Li, Ma and Wright 2011, doi:10.1145/1970392.1970395, section 5.
    """
    given = columns.to(WORKING)
    n, m = given.shape[-2:]
    weight = sparsity if sparsity is not None else max(n, m) ** -0.5
    total = given.abs().sum((-2, -1), keepdim=True)
    penalty = n * m / (4 * total.where(total > 0, 1))
    bound = tolerance * torch.linalg.matrix_norm(given)
    sparse = dual = torch.zeros_like(given)
    for step in range(steps):
        low = shrink_singular(given - sparse + dual / penalty, 1 / penalty)
        sparse = shrink(given - low + dual / penalty, weight / penalty)
        residual = given - low - sparse
        dual = dual + penalty * residual
        if step % 10 == 9 and bool((torch.linalg.matrix_norm(residual) <= bound).all()):
            break
    return Parts(low=low.to(columns.dtype), sparse=sparse.to(columns.dtype))


def shrink(x: Tensor, by: Tensor) -> Tensor:
    """Soft thresholding: every entry is moved toward zero by `by`, at most to zero."""
    return x.sign() * (x.abs() - by).clamp_min(0)


def shrink_singular(x: Float[Tensor, "*batch n m"], by: Tensor) -> Float[Tensor, "*batch n m"]:
    """Soft thresholding of the singular values by `by` [*batch, 1, 1], with the m x m Gram matrix: O(n m^2)."""
    values, vectors = torch.linalg.eigh(x.mT @ x)
    singular = values.clamp_min(0).sqrt()[..., None, :]
    kept = torch.where(singular > by, 1 - by / singular.clamp_min(torch.finfo(x.dtype).tiny), 0)
    return torch.matmul(x, (vectors * kept) @ vectors.mT)
