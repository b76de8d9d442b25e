"""Weighted terms of a sum of products, the common input of this package's modules."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import LowRank

Terms = Sequence[tuple[float, LowRank]]
"""Pairs (w_i, f_i), which represent the matrix sum_i w_i b_i a_i. Ranks may differ; sizes and batch axes must agree."""

WORKING = torch.float64
"""Data type of every decomposition, inner product and solve, regardless of the factors' data type."""

_BLOCK = 256  # ranks multiplied at once when a dense sum is formed: large enough for BLAS, small enough for memory


def sizes(terms: Terms) -> tuple[int, int, int]:
    """Out, in, and the sum of the ranks.

    Raises:
        ValueError: no terms, or terms whose dtypes, or shapes except for the rank, differ.
    """
    if not terms:
        raise ValueError("expected at least one (weight, factors) pair, got none")
    first = terms[0][1]
    for i, (_, factor) in enumerate(terms):
        if _frame(factor) != _frame(first):
            raise ValueError(f"cannot add term {i}, b {_describe(factor.b)} and a {_describe(factor.a)}, to term 0, b "
                             f"{_describe(first.b)} and a {_describe(first.a)}: all but the ranks must agree")  # fmt: skip
    return first.b.shape[-2], first.a.shape[-1], sum(factor.rank for _, factor in terms)


def shared_rank(terms: Terms) -> int:
    """The rank of every term.

    Raises:
        ValueError: see `sizes`, or the ranks differ.
    """
    sizes(terms)
    rank = terms[0][1].rank
    for i, (_, factor) in enumerate(terms):
        if factor.rank != rank:
            raise ValueError(
                f"term {i} has rank {factor.rank}, term 0 has rank {rank}: factors of different ranks cannot be averaged; "
                "pad them, or add their products"
            )
    return rank


def concat_factors(terms: Terms, dtype: torch.dtype) -> LowRank:
    """The sum as factors in `dtype`: the columns of the weighted b, and the rows of the a, concatenated."""
    _, in_, rank = sizes(terms)
    first = terms[0][1]
    b = torch.empty(*first.b.shape[:-1], rank, dtype=dtype, device=first.b.device)
    a = torch.empty(*first.a.shape[:-2], rank, in_, dtype=dtype, device=first.a.device)
    start = 0
    for weight, factor in terms:
        end = start + factor.rank
        b[..., start:end] = factor.b
        b[..., start:end] *= weight
        a[..., start:end, :] = factor.a
        start = end
    return LowRank(b=b, a=a)


def dense(terms: Terms, dtype: torch.dtype = WORKING) -> Float[Tensor, "*batch out in"]:
    """The sum as a matrix, accumulated in `dtype`; only a few hundred ranks at a time are held in addition."""
    first = terms[0][1]
    out, in_, _ = sizes(terms)
    batch = first.b.shape[:-2]
    total = torch.zeros(batch.numel(), out, in_, dtype=dtype, device=first.b.device)
    for block in _blocks(terms):
        stack = concat_factors(block, dtype)
        total.baddbmm_(stack.b.reshape(-1, out, stack.rank), stack.a.reshape(-1, stack.rank, in_))
    return total.reshape(*batch, out, in_)


def _blocks(terms: Terms) -> list[list[tuple[float, LowRank]]]:
    blocks: list[list[tuple[float, LowRank]]] = [[]]
    for term in terms:
        if sum(factor.rank for _, factor in blocks[-1]) >= _BLOCK:
            blocks.append([])
        blocks[-1].append(term)
    return blocks


def _frame(factor: LowRank) -> tuple[torch.Size, torch.Size, int, torch.dtype]:
    return factor.b.shape[:-1], factor.a.shape[:-2], factor.a.shape[-1], factor.b.dtype


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype}".replace("torch.", "")
