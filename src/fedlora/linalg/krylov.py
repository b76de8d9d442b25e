"""Block Krylov iteration: leading right singular vectors from matrix products alone."""

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import LowRank

Matrix = LowRank | Tensor
"""A factored or dense matrix."""

_TOLERANCE = 1e-7
_LEAST_STEPS = 3  # number of blocks before the convergence rate is estimated


def times(matrix: Matrix, x: Float[Tensor, "*batch in k"]) -> Float[Tensor, "*batch out k"]:
    """matrix @ x."""
    return matrix @ x if isinstance(matrix, Tensor) else matrix.b @ (matrix.a @ x)


def transposed(matrix: Matrix) -> Matrix:
    """The transpose, without a copy."""
    return matrix.mT if isinstance(matrix, Tensor) else LowRank(b=matrix.a.mT, a=matrix.b.mT)


def power_step(matrix: Matrix, basis: Float[Tensor, "*batch in k"]) -> Float[Tensor, "*batch in k"]:
    """An orthonormal basis of m^T m basis; errors decrease by the squared ratio of singular values."""
    image = torch.linalg.qr(times(matrix, basis)).Q
    back: Tensor = torch.linalg.qr(times(transposed(matrix), image)).Q
    return back


def converged_basis(matrix: Matrix, rank: int, width: int, steps: int) -> Float[Tensor, "*batch in rank"] | None:
    """The `rank` leading right singular vectors, or None if the error bound is not met after `steps` blocks of `width`.

    Let t_i be the Ritz values and e_i the residual norms of m^T m on the Krylov space. The part of |m|^2 in the space
    of the `rank` vectors is at most sum_{i <= rank} e_i less than the maximum, and at least sum_{i > rank} t_i of |m|^2
    is outside of it. Together these bound the excess of the projection's distance from m over the minimum, which must
    be below 1e-7 |m|. (A singular vector exactly orthogonal to the start is never found; for the Gaussian start used
    here that has probability zero.) Stops early if the bound does not fall fast enough. Synchronizes with the device
    once per step.
    """
    factor = matrix if isinstance(matrix, Tensor) else matrix.a
    block = torch.randn(factor.shape[-1], width, generator=torch.Generator().manual_seed(0), dtype=factor.dtype)
    block = torch.linalg.qr(block.to(factor.device)).Q.expand(*factor.shape[:-2], -1, -1)
    space, excesses = block, [float("inf")]
    images = times(transposed(matrix), times(matrix, block))
    for step in range(1, steps + 1):
        values, vectors = torch.linalg.eigh(_symmetric(space.mT @ images))
        top = vectors[..., -rank:]
        basis: Tensor = space @ top
        pending = (images @ top - basis * values[..., None, -rank:]).square().sum(-2).sqrt().sum(-1)
        unavoidable = values[..., :-rank].clamp_min(0).sum(-1).sqrt()
        excess = torch.minimum(pending.sqrt(), pending / unavoidable) / values.clamp_min(0).sum(-1).sqrt()
        excesses.append(float(excess.nan_to_num(0).max()))
        if excesses[-1] <= _TOLERANCE:
            return basis
        rate = excesses[-1] / excesses[-2]
        if step == steps or (step >= _LEAST_STEPS and excesses[-1] * rate ** (steps - step) > _TOLERANCE):
            return None
        block = images[..., -width:]
        for _ in range(2):  # one orthogonalization is not enough in floating point
            block = torch.linalg.qr(block - space @ (space.mT @ block)).Q
        space = torch.cat([space, block], -1)
        images = torch.cat([images, times(transposed(matrix), times(matrix, block))], -1)
    return None


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2
