"""Subspaces of factors: principal angles, similarity, changes of ranks, and rotations of factors."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.weighted_terms import WORKING

Side = Literal["b", "a"]


def orthonormal(columns: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n k"]:
    """An orthonormal basis of a space that contains the columns; k vectors even if columns are dependent."""
    basis: Tensor = torch.linalg.qr(columns.to(WORKING)).Q
    return basis.to(columns.dtype)


def frame(n: int, k: int, rng: torch.Generator) -> Float[Tensor, "n k"]:
    """k random columns of length n, fp32, in groups of n orthonormal ones; equal on every machine up to rounding.

    The q of a QR decomposition is unique if r has a positive diagonal, regardless of the library's choice of signs.
    """
    blocks = []
    for start in range(0, k, n):
        drawn = torch.randn(n, min(n, k - start), generator=rng, device=rng.device, dtype=WORKING)
        q, r = torch.linalg.qr(drawn)
        blocks.append(q * r.diagonal().sign())
    return torch.cat(blocks, 1).float()


def angles(u: Float[Tensor, "*batch n j"], v: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch m"]:
    """The m = min(j, k) principal angles between the spaces of the columns, in radians, ascending; in fp64.

    Small angles are computed from sines, as the cosine of a small angle determines only half of its digits.
    Source: Bjoerck and Golub 1973, Numerical methods for computing angles between linear subspaces.
    """
    larger, smaller = (u, v) if u.shape[-1] >= v.shape[-1] else (v, u)
    larger, smaller = (torch.linalg.qr(x.to(WORKING)).Q for x in (larger, smaller))
    cosines = torch.linalg.svdvals(larger.mT @ smaller).clamp(max=1)  # descending
    sines = torch.linalg.svdvals(smaller - larger @ (larger.mT @ smaller)).flip(-1).clamp(max=1)  # ascending
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def similarity(x: Float[Tensor, "*batch n j"], y: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch"]:
    """Linear centered kernel alignment, in [0, 1] and in fp64: |x^T y|^2 / (|x^T x| |y^T y|), Frobenius, columns centered.

    It is 1 for y = x, and does not change if x or y is scaled, or multiplied from the right by an orthogonal matrix. If
    all rows of x or of y are equal, it is undefined, and 1 is returned.
    Source: Kornblith et al. 2019, arXiv:1905.00414.
    """
    x, y = (z.to(WORKING) - z.to(WORKING).mean(-2, keepdim=True) for z in (x, y))
    own = _square(x.mT @ x).sqrt() * _square(y.mT @ y).sqrt()
    return torch.where(own > 0, _square(x.mT @ y) / own.clamp_min(1e-300), 1.0).clamp(max=1.0)


def rank_change(start: LowRank, trained: LowRank, side: Side) -> Float[Tensor, "*batch rank"]:
    """The change of each rank's product when only `side` was trained: |db_i| |a_i|, or |b_i| |da_i|; in at least fp32.

    The Frobenius norm of a product of rank one is the product of the norms, so that no [out, in] matrix is formed.
    Source: Koo et al. 2025, arXiv:2410.22815, section 4.2.
    """
    moved_b = trained.b.to(WORKING) - start.b.to(WORKING) if side == "b" else start.b.to(WORKING)
    moved_a = trained.a.to(WORKING) - start.a.to(WORKING) if side == "a" else start.a.to(WORKING)
    score = moved_b.square().sum(-2).sqrt() * moved_a.square().sum(-1).sqrt()
    return score.to(torch.promote_types(start.b.dtype, torch.float32))


def align(factor: LowRank, reference: LowRank, side: Side, strength: float = 1.0, proper: bool = True) -> LowRank:
    """The same matrix in other factors (b r, r^T a), r orthogonal, with the factor `side` near the reference's.

    With `strength` 1, r is the rotation (with `proper` False: the orthogonal matrix) that minimizes the distance to the
    reference; with 0 it is the identity, and values in between interpolate.

    Raises:
        ValueError: the ranks differ, or strength is outside [0, 1].
    Source: Zhang et al. 2026, arXiv:2602.23638.
    """
    if factor.rank != reference.rank:
        raise ValueError(f"cannot align factors of rank {factor.rank} with a reference of rank {reference.rank}")
    if not 0 <= strength <= 1:
        raise ValueError(f"expected strength in [0, 1], got {strength}")
    cross = (
        factor.b.mT.to(WORKING) @ reference.b.to(WORKING)
        if side == "b"
        else factor.a.to(WORKING) @ reference.a.mT.to(WORKING)
    )
    hard = _nearest_orthogonal(cross, proper)
    soft = _nearest_orthogonal((1 - strength) * torch.eye(factor.rank).to(hard) + strength * hard, proper=False)
    dtype = factor.b.dtype
    return LowRank(b=(factor.b.to(WORKING) @ soft).to(dtype), a=(soft.mT @ factor.a.to(WORKING)).to(dtype))


def aligned_rows(
    rows: Float[Tensor, "many n"], reference: Float[Tensor, "k n"], fallback: Float[Tensor, "k n"], tolerance: float
) -> Float[Tensor, "k n"]:
    """s @ rows, for the s with k <= many orthonormal rows that has the largest inner product with the reference; fp64.

    For k = many it is nearest to the reference (Procrustes). s is the polar factor of reference @ rows^T, which is not
    unique if that has a rank below k; s then maps the null spaces to each other as is best for `fallback`. Hence rows
    with the same rows^T rows give the same result. Singular values up to `tolerance` |reference| |rows| count as zero.
    """
    rows, reference = rows.to(WORKING), reference.to(WORKING)
    u, s, vt = torch.linalg.svd(reference @ rows.mT, full_matrices=False)
    found = int((s > tolerance * reference.norm() * rows.norm()).sum())
    turn: Tensor = u[:, :found] @ vt[:found]
    if found < len(reference):
        u, _, vt = torch.linalg.svd(reference @ rows.mT)
        left, right = u[:, found:], vt[found:]
        x, _, yt = torch.linalg.svd(left.mT @ fallback.to(WORKING) @ rows.mT @ right.mT, full_matrices=False)
        turn = turn + left @ x @ yt @ right
    return turn @ rows


def _nearest_orthogonal(x: Tensor, proper: bool) -> Tensor:
    u, _, vt = torch.linalg.svd(x)
    if proper:  # a reflection becomes a rotation by a change of sign at the smallest singular value
        sign = torch.linalg.det(u @ vt)
        vt = torch.cat([vt[..., :-1, :], sign.sign()[..., None, None] * vt[..., -1:, :]], -2)
    return torch.matmul(u, vt)


def _square(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1))
