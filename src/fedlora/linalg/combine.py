"""Exact arithmetic of factored matrices: sums, means, residuals of factor means, and norms without a dense matrix."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.weighted_terms import WORKING, Terms, concat_factors, dense, shared_rank, sizes


def stack(terms: Terms) -> LowRank:
    """The exact sum of the terms, whose rank is the sum of their ranks. The weights are applied to `b` only."""
    sizes(terms)
    dtype = terms[0][1].b.dtype
    return _cast(concat_factors(terms, torch.promote_types(dtype, torch.float32)), dtype)


def mean(terms: Terms) -> LowRank:
    """The separate weighted means of the b and of the a; this is not the mean of the products, see `residual`.

    Raises:
        ValueError: the ranks differ.
    """
    shared_rank(terms)
    first = terms[0][1]
    b, a = torch.zeros_like(first.b, dtype=WORKING), torch.zeros_like(first.a, dtype=WORKING)
    for weight, (_, factor) in zip(_normalized_weights(terms), terms, strict=True):
        b += weight * factor.b.to(WORKING)
        a += weight * factor.a.to(WORKING)
    return _cast(LowRank(b=b, a=a), first.b.dtype)


def difference(after: LowRank, before: LowRank) -> LowRank:
    """The matrix `after` minus `before`, of the sum of their ranks, or of one's if they have a factor in common.

    With equal ranks from the differences of the factors, so that small changes of large factors keep their digits.
    """
    if after.rank != before.rank:
        return stack([(1.0, after), (-1.0, before)])
    if after.a is before.a:
        return LowRank(b=after.b - before.b, a=after.a)
    if after.b is before.b:
        return LowRank(b=after.b, a=after.a - before.a)
    return stack([(1.0, LowRank(b=after.b - before.b, a=after.a)), (1.0, LowRank(b=before.b, a=after.a - before.a))])


def residual(terms: Terms) -> LowRank:
    """The weighted mean of the products minus the product of the mean factors, of rank (number of terms - 1) * rank.

    It is the covariance sum_i w_i (b_i - b_mean)(a_i - a_mean). As the deviations of b sum to zero, those of a can be
    computed relative to the last a instead of the mean, so that the last term is zero.

    Raises:
        ValueError: the ranks differ.
    """
    shared_rank(terms)
    last = _cast(terms[-1][1], WORKING)
    deviations = [
        (weight, LowRank(b=f.b.to(WORKING) - last.b, a=f.a.to(WORKING) - last.a))
        for weight, (_, f) in zip(_normalized_weights(terms), terms, strict=True)
    ]
    center = mean(deviations).b
    centered = [(weight, LowRank(b=f.b - center, a=f.a)) for weight, f in deviations]
    return _cast(leading(concat_factors(centered, WORKING), (len(terms) - 1) * last.rank), terms[0][1].b.dtype)


def leading(factor: LowRank, rank: int) -> LowRank:
    """The first `rank` ranks, or all of them if there are fewer."""
    return LowRank(b=factor.b[..., :rank], a=factor.a[..., :rank, :])


def pad(factor: LowRank, rank: int) -> LowRank:
    """The same matrix zero-padded in b and a to `rank` ranks; the added ranks get no gradient."""
    missing = _missing(factor, rank)
    return LowRank(
        b=torch.constant_pad_nd(factor.b, (0, missing)),
        a=torch.constant_pad_nd(factor.a, (0, 0, 0, missing)),
    )


def widen(factor: LowRank, rank: int, rng: torch.Generator) -> LowRank:
    """The same matrix with `rank` trainable ranks: a gets a random row for each rank that is added or has zero b and a."""
    padded = pad(factor, rank)
    dead = (padded.b == 0).all(-2) & (padded.a == 0).all(-1)  # [*batch, rank]
    return LowRank(
        b=padded.b, a=torch.where(dead[..., None], fresh_rows(tuple(padded.a.shape), rng).to(padded.a), padded.a)
    )


def fresh_rows(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Initial rows of a as in LoRA: uniform in +-1/sqrt(in), `in` the last axis; on the generator's device, fp32."""
    return (2 * torch.rand(shape, generator=rng, device=rng.device) - 1) / math.sqrt(shape[-1])


def inner(u: LowRank, v: LowRank) -> Float[Tensor, "*batch"]:
    """The Frobenius inner product of two factored matrices, from rank x rank Gram blocks, in at least fp32."""
    return _inner(_cast(u, WORKING), _cast(v, WORKING)).to(torch.promote_types(u.b.dtype, torch.float32))


def norm(factor: LowRank) -> Float[Tensor, "*batch"]:
    """The Frobenius norm, in at least fp32."""
    return _norm([(1.0, factor)]).to(torch.promote_types(factor.b.dtype, torch.float32))


def relative_error(update: LowRank, terms: Terms) -> Float[Tensor, "*batch"]:
    """The Frobenius distance of `update` from the sum of the terms, relative to the norm of the sum; NaN if that is zero.

    The rounding error is about 1e-8 for fp32 and 1e-15 for fp64 factors, times the cancellation in the sum.
    """
    dtype = torch.promote_types(terms[0][1].b.dtype, update.b.dtype)
    cast_terms = [(weight, _cast(factor, dtype)) for weight, factor in terms]
    error = _norm([*cast_terms, (-1.0, _cast(update, dtype))]) / _norm(cast_terms)
    return error.to(torch.promote_types(dtype, torch.float32))


def _norm(terms: Terms) -> Tensor:
    """The norm in fp64. A Gram matrix loses half of the digits: acceptable for fp32 factors; fp64 factors need a QR."""
    out, in_, rank = sizes(terms)
    if rank * (out + in_) >= out * in_:
        return dense(terms).square().sum((-2, -1)).sqrt()
    total = concat_factors(terms, WORKING)
    if terms[0][1].b.dtype == WORKING:
        core = torch.matmul(torch.linalg.qr(total.a.mT, mode="r").R, total.b.mT)
        return core.square().sum((-2, -1)).sqrt()
    return _inner(total, total).clamp_min(0).sqrt()


def _inner(u: LowRank, v: LowRank) -> Tensor:
    return torch.sum((u.b.mT @ v.b) * (u.a @ v.a.mT), (-2, -1))


def _normalized_weights(terms: Terms) -> list[float]:
    total = math.fsum(weight for weight, _ in terms)
    if not total > 0:
        raise ValueError(f"expected weights with a positive sum, got {[weight for weight, _ in terms]}")
    return [weight / total for weight, _ in terms]


def _missing(factor: LowRank, rank: int) -> int:
    if rank < factor.rank:
        raise ValueError(f"expected at least the factor's {factor.rank} ranks, got {rank}; to truncate, use `leading`")
    return rank - factor.rank


def _cast(factor: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(b=factor.b.to(dtype), a=factor.a.to(dtype))
