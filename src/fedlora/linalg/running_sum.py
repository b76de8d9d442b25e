"""Running sum of products, which are added one at a time; memory does not grow with their number."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.fit import Split, best_fit, svd, truncate
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.weighted_terms import dense, sizes

_PENDING = 256  # ranks buffered before they are added to a dense matrix, so that one pass over it serves many terms


@dataclass(frozen=True)
class RunningSum:
    """Sum of the terms so far, in at least fp32: as factors while these are smaller than the matrix, then as the matrix.

    With a `budget`, always as factors, of at most 2 * budget ranks plus those of one term: if there are more, only the
    `budget` largest singular values are kept, and the norm of the remainder is added to `lost`, a bound on the distance
    from the exact sum.
    """

    budget: int | None = None
    factors: tuple[LowRank, ...] = ()
    matrix: Float[Tensor, "*batch out in"] | None = None
    lost: Float[Tensor, "*batch"] | float = 0.0

    def add(self, weight: float, factor: LowRank) -> "RunningSum":
        """The sum with one more term.

        Raises:
            ValueError: the term's sizes, batch axes or dtype differ from those of earlier terms.
        """
        dtype = torch.promote_types(factor.b.dtype, torch.float32)
        grown = (*self.factors, LowRank(b=weight * factor.b.to(dtype), a=factor.a.to(dtype)))
        out, in_, rank = sizes([(1.0, f) for f in grown])
        if self.budget is not None:
            return replace(self, factors=grown) if rank <= 2 * self.budget else self._compressed(grown, self.budget)
        limit = out * in_ / (out + in_)
        if rank < (limit if self.matrix is None else min(limit, _PENDING)):
            return replace(self, factors=grown)
        return replace(self, factors=(), matrix=self._filled(grown))

    def times(self, factor: float) -> "RunningSum":
        """`factor` times the sum so far."""
        parts = tuple(LowRank(b=factor * part.b, a=part.a) for part in self.factors)
        matrix = None if self.matrix is None else factor * self.matrix
        return replace(self, factors=parts, matrix=matrix, lost=abs(factor) * self.lost)

    def select(self, index: Sequence[int]) -> "RunningSum":
        """The sums at these indices of the first batch axis."""
        places = list(index)
        parts = tuple(LowRank(b=part.b[places], a=part.a[places]) for part in self.factors)
        lost = self.lost[places] if isinstance(self.lost, Tensor) else self.lost
        return replace(self, factors=parts, matrix=None if self.matrix is None else self.matrix[places], lost=lost)

    def best_fit(self, rank: int, scale: float = 1.0, split: Split = "left", seed: int = 0) -> LowRank:
        """`fit.best_fit` of `scale` times the sum so far, in the dtype of the sum.

        Raises:
            ValueError: no term was added yet.
        """
        if self.matrix is None:
            return best_fit([(scale, f) for f in self.factors], rank, split, seed)
        return truncate(scale * self._filled(self.factors), rank, split, seed)

    def _filled(self, factors: tuple[LowRank, ...]) -> Tensor:
        if not factors and self.matrix is not None:
            return self.matrix
        more = dense([(1.0, f) for f in factors], factors[0].b.dtype)
        return more if self.matrix is None else more.add_(self.matrix)

    def _compressed(self, factors: tuple[LowRank, ...], budget: int) -> "RunningSum":
        u, s, vt = svd([(1.0, f) for f in factors])
        kept = LowRank(b=u[..., :budget] * s[..., None, :budget], a=vt[..., :budget, :])
        dtype = factors[0].b.dtype
        lost = self.lost + s[..., budget:].square().sum(-1).sqrt()
        return replace(self, factors=(LowRank(b=kept.b.to(dtype), a=kept.a.to(dtype)),), lost=lost)
