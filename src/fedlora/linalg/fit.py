"""Best low-rank approximation, and singular value decomposition, of a sum of products."""

from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.combine import fresh_rows
from fedlora.linalg.krylov import Matrix, converged_basis, power_step, times
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.weighted_terms import WORKING, Terms, concat_factors, dense, sizes

Split = Literal["left", "balanced"]
Svd = tuple[Tensor, Tensor, Tensor]

_EIGEN = 5  # cost of the leading eigenvectors of an n x n matrix in units of n^3 multiplications (fp64, CPU, n = 800)
_PARTIAL = 100  # rows from which partial computations are faster: leading eigenvectors only, half of a symmetric product
_SPARE = 8  # oversampling: extra ranks that make the last requested one converge
_CHUNK = {"cpu": 1 << 20}  # elements decomposed at once: larger batches are not faster on a CPU and need more memory
_CHUNK_ELSE = 1 << 26
_DEAD = {torch.float64: 1e-13}  # relative to the largest singular value; smaller ones are rounding
_DEAD_ELSE = 1e-7


def best_fit(terms: Terms, rank: int, split: Split = "left", seed: int = 0) -> LowRank:
    """The matrix of rank at most `rank` nearest (Frobenius) to sum_i w_i b_i a_i, with exactly `rank` columns in b.

    `split` places the singular values: all in b ("left": a has orthonormal rows), or their square roots in both
    factors. Unused ranks get b = 0 and a random row in a, drawn from `seed`, so that they remain trainable. Factors are
    unique only up to sign.

    With R the sum of the ranks, no [out, in] matrix is formed unless R >= min(out, in) or that is cheaper. If it is
    expected to be cheaper, a block Krylov iteration is tried first. Its result is accepted if its own error bound shows
    that the distance from the sum exceeds the minimum by at most 1e-7 of the norm of the sum. Otherwise the exact path
    is used: eigenvectors of the R x R (or smaller dense) Gram matrix in fp64, then one power step on the factors, which
    restores the digits lost by squaring. For fp64 factors, `svd` is used.

    Raises:
        ValueError: no terms, or terms of different sizes.
    Source: Bai et al. 2024, arXiv:2402.11505, section 3.2; Musco and Musco 2015, arXiv:1504.05477 (block Krylov).
    """
    out, in_, stacked = sizes(terms)
    first = terms[0][1].b

    def decompose(chunk: Terms) -> Svd:
        if first.dtype == WORKING:
            return svd(chunk)
        total = dense(chunk) if stacked >= min(out, in_) else concat_factors(chunk, WORKING)
        return _leading_svd(total, (out, in_, stacked), rank)

    batch = first.shape[:-2]
    flat = [(w, LowRank(b=f.b.reshape(-1, *f.b.shape[-2:]), a=f.a.reshape(-1, *f.a.shape[-2:]))) for w, f in terms]
    size = _batch_size(min(stacked * (out + in_), out * in_), first.device)
    parts = [
        decompose([(w, LowRank(b=f.b[i : i + size], a=f.a[i : i + size])) for w, f in flat])
        for i in range(0, batch.numel(), size)
    ]
    u, s, vt = (torch.cat(x).reshape(*batch, *x[0].shape[1:]) for x in zip(*parts, strict=True))
    return _factors(u, s, vt, rank, split, first.dtype, seed)


def truncate(matrix: Float[Tensor, "*batch out in"], rank: int, split: Split = "left", seed: int = 0) -> LowRank:
    """`best_fit` of a dense matrix."""
    *batch, out, in_ = matrix.shape

    def decompose(chunk: Tensor) -> Svd:
        if matrix.dtype == WORKING:
            return tuple(torch.linalg.svd(chunk, full_matrices=False))
        return _leading_svd(chunk.to(WORKING), (out, in_, min(out, in_)), rank)

    parts = [decompose(chunk) for chunk in torch.split(matrix.reshape(-1, out, in_), _batch_size(out * in_, matrix.device))]
    u, s, vt = (torch.cat(x).reshape(*batch, *x[0].shape[1:]) for x in zip(*parts, strict=True))
    return _factors(u, s, vt, rank, split, matrix.dtype, seed)


def svd(terms: Terms) -> tuple[Float[Tensor, "*batch out k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch k in"]]:
    """The compact singular value decomposition u, s, vt of the sum, k = min(R, out, in), in fp64.

    Thin QR of the stacked factors, then an SVD of the small core, so that no digits are lost by squaring. u and vt are
    orthonormal even where s is zero. Uses the dense matrix if R >= min(out, in).
    """
    out, in_, stacked = sizes(terms)
    if stacked >= min(out, in_):
        u, s, vt = torch.linalg.svd(dense(terms), full_matrices=False)
        return u, s, vt
    total = concat_factors(terms, WORKING)
    left, right = torch.linalg.qr(total.b), torch.linalg.qr(total.a.mT)
    u, s, vt = torch.linalg.svd(left.R @ right.R.mT)
    return left.Q @ u, s, vt @ right.Q.mT


def recompress(factor: LowRank, tolerance: float = 1e-6) -> LowRank:
    """The same matrix, to within `tolerance` of its norm, at the smallest sufficient rank (0 for a zero matrix).

    A batch gets the largest rank needed. Synchronizes with the device, as the shape depends on the values.
    """
    u, s, vt = svd([(1.0, factor)])
    tail = s.square().flip(-1).cumsum(-1).flip(-1).sqrt()  # [*batch, k]: the error of keeping only the preceding ranks
    rank = int((tail > tolerance * tail[..., :1]).sum(-1).max())
    return _factors(u, s, vt, rank, "left", factor.b.dtype, seed=0)


def gram(x: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n n"]:
    """x x^T. Most of the symmetric entries are computed once, which saves a third of the time for n = 800."""
    n = x.shape[-2]
    product, step = x.new_empty(*x.shape[:-1], n), max(_PARTIAL, -(-n // 4))
    for i in range(0, n, step):
        rows = x[..., i : i + step, :] @ x[..., : i + step, :].mT
        product[..., i : i + step, : i + step] = rows
        product[..., :i, i : i + step] = rows[..., :i].mT
    return product


def leading_eigenvectors(matrix: Float[Tensor, "*batch n n"], count: int) -> Float[Tensor, "*batch n count"]:
    """Eigenvectors of the `count` largest eigenvalues of a symmetric matrix in fp64, in ascending order."""
    n = matrix.shape[-1]
    if n < _PARTIAL or matrix.device.type != "cpu":
        vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors
        return vectors[..., -count:]
    import scipy.linalg

    flat = matrix.reshape(-1, n, n).numpy()
    with _blas().limit(limits=1):
        found = [scipy.linalg.eigh(one, subset_by_index=(n - count, n - 1), driver="evr")[1] for one in flat]
    return torch.stack([torch.from_numpy(one) for one in found]).reshape(*matrix.shape[:-1], count)


@cache
def _blas() -> Any:
    """Controller of the BLAS threads of numpy and scipy, which would occupy torch's cores for a while when idle."""
    import scipy.linalg  # noqa: F401  (libraries not loaded yet are not found)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def _batch_size(elements: int, device: torch.device) -> int:
    """The number of matrices of this many elements to decompose together."""
    return max(1, _CHUNK.get(device.type, _CHUNK_ELSE) // max(1, elements))


def _leading_svd(matrix: Matrix, shape: tuple[int, int, int], rank: int) -> Svd:
    """The `rank` leading singular triples, or as many as exist; `shape` is (out, in, maximum rank)."""
    out, in_, stacked = shape
    width = min(rank + _SPARE, out, in_, stacked)
    steps = _affordable_steps(shape, width)
    basis = converged_basis(matrix, min(rank, width), width, steps) if steps else None
    if basis is None:
        basis = power_step(matrix, _gram_basis(matrix, shape, width))
    u, s, vt = torch.linalg.svd(times(matrix, basis), full_matrices=False)
    return u[..., :rank], s[..., :rank], vt[..., :rank, :] @ basis.mT


def _gram_basis(matrix: Matrix, shape: tuple[int, int, int], width: int) -> Tensor:
    """The leading right singular vectors, not orthonormalized, from an eigendecomposition of the smallest Gram matrix."""
    if isinstance(matrix, LowRank) and _dense_flops(*shape) < _gram_flops(*shape):
        matrix = matrix.product()
    if isinstance(matrix, Tensor):
        wide = shape[0] < shape[1]
        vectors = leading_eigenvectors(gram(matrix if wide else matrix.mT), width)
        return torch.matmul(matrix.mT, vectors) if wide else vectors
    root = _root(gram(matrix.a))
    image = gram(matrix.b.mT) @ root
    return torch.matmul(matrix.a.mT, image @ leading_eigenvectors(root.mT @ image, width))


def _root(gram: Tensor) -> Tensor:
    """A root with root root^T = gram, also for dependent rows. Synchronizes with the device."""
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return root  # type: ignore[no-any-return]


def _affordable_steps(shape: tuple[int, int, int], width: int) -> int:
    """The number of Krylov blocks that cost a third of the exact path; 0 if they are too few."""
    out, in_, stacked = shape
    dense_already = stacked >= min(out, in_)
    if dense_already:
        exact, product = _dense_flops(out, in_, 0), out * in_
    else:
        exact, product = min(_gram_flops(*shape), _dense_flops(*shape)), (out + in_) * stacked
    block = 4 * width * product + 16 * in_ * width**2  # a product with m, one with m^T; orthogonalization
    steps = min(exact // (3 * block), min(out, in_, stacked) // (2 * width))
    return steps if steps > 3 else 0


def _gram_flops(out: int, in_: int, stacked: int) -> int:
    return 2 * (out + in_) * stacked**2 + (_EIGEN + 5) * stacked**3


def _dense_flops(out: int, in_: int, stacked: int) -> int:
    side = min(out, in_)
    return 2 * out * in_ * (stacked + side) + _EIGEN * side**3


def _factors(u: Tensor, s: Tensor, vt: Tensor, rank: int, split: Split, dtype: torch.dtype, seed: int) -> LowRank:
    """Factors of exactly `rank` ranks; singular values at rounding level become unused ranks."""
    missing = max(0, rank - s.shape[-1])
    u = torch.constant_pad_nd(u[..., :rank], (0, missing))
    s = torch.constant_pad_nd(s[..., :rank], (0, missing))
    vt = torch.constant_pad_nd(vt[..., :rank, :], (0, 0, 0, missing))
    live = s > s[..., :1] * _DEAD.get(dtype, _DEAD_ELSE)
    rows = fresh_rows((rank, vt.shape[-1]), torch.Generator().manual_seed(seed)).to(vt)
    on_b, on_a = (s, torch.ones_like(s)) if split == "left" else (s.sqrt(), s.sqrt())
    b = torch.where(live[..., None, :], u * on_b[..., None, :], 0)
    a = torch.where(live[..., None], vt * on_a[..., None], rows)
    return LowRank(b=b.to(dtype), a=a.to(dtype))
