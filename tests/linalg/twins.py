"""Random terms with known trouble, and the dense fp64 formulas that the factored ones must equal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.weighted_terms import Terms

OUT, IN = 30, 22


def random_factor(
    rank: int, out: int = OUT, in_: int = IN, seed: int = 0, batch: Sequence[int] = (), dtype=torch.float64
) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    b = torch.randn(*batch, out, rank, generator=rng, dtype=torch.float64) / out**0.5
    a = torch.randn(*batch, rank, in_, generator=rng, dtype=torch.float64) / in_**0.5
    return LowRank(b=b.to(dtype), a=a.to(dtype))


def random_terms(ranks: Sequence[int], seed: int = 0, **shape) -> Terms:
    weights = [1.0 + (i * 7 + seed) % 5 for i in range(len(ranks))]
    return [
        (w / sum(weights), random_factor(r, seed=100 * seed + i, **shape))
        for i, (w, r) in enumerate(zip(weights, ranks, strict=True))
    ]


def drifted_terms(count: int, rank: int, drift: float, seed: int = 0, dtype=torch.float64, **shape) -> Terms:
    """Factors that all started from the same ones: nearly dependent for a small drift."""
    start = random_factor(rank, seed=seed, **shape)
    moves = [random_factor(rank, seed=1000 + 100 * seed + i, **shape) for i in range(count)]
    drifted = [LowRank(b=(start.b + drift * m.b).to(dtype), a=(start.a + drift * m.a).to(dtype)) for m in moves]
    return [(1.0 / count, factor) for factor in drifted]


def total(terms: Terms) -> Tensor:
    """The sum of the products, dense and in fp64."""
    return sum(weight * (f.b.double() @ f.a.double()) for weight, f in terms)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def apart(x: Tensor, y: Tensor, scale: Tensor | None = None) -> float:
    """The largest Frobenius distance in the batch, relative to `scale`, or to y."""
    reference = torch.linalg.matrix_norm((y if scale is None else scale).double())
    return float((torch.linalg.matrix_norm(x.double() - y.double()) / reference).max())
