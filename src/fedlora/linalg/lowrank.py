"""Matrices kept as factors."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix b @ a, exactly: no hidden scale. Leading batch axes are allowed and must agree."""

    b: Float[Tensor, "*batch out rank"]
    a: Float[Tensor, "*batch rank in"]

    @property
    def rank(self) -> int:
        """Number of columns of `b`, which is the number of rows of `a`."""
        return self.b.shape[-1]

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The dense matrix."""
        return self.b @ self.a
