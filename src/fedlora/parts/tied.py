"""One trained factor, used twice, beside a fixed frame."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import Base, LowRank, Rows, applied


@dataclass(frozen=True)
class Tied:
    """The matrix (a^T a - offset^T offset) frame, or frame (a^T a - offset^T offset) if out > in. Batch axes are allowed.

    short = min(out, in). The frame has orthonormal rows, or columns if out > in, and is frozen like the offset, which may
    have no rows.
    """

    a: Float[Tensor, "*batch rank short"]
    offset: Float[Tensor, "*batch offset_rank short"]
    frame: Float[Tensor, "*batch out in"]

    in_head: ClassVar[Literal[False]] = False
    reads_input: ClassVar[bool] = False
    structure: ClassVar[int] = 0

    @property
    def rank(self) -> int:
        """Number of rows of `a`."""
        return self.a.shape[-2]

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The dense matrix."""
        return self.as_two_factors().product()

    def as_two_factors(self) -> LowRank:
        """The same matrix as two factors, of the rank of a plus that of the offset; a^T a is not formed."""
        b, a = torch.cat([self.a, -self.offset], -2).mT, torch.cat([self.a, self.offset], -2)
        out, in_ = self.frame.shape[-2:]
        return LowRank(b=self.frame @ b, a=a) if out > in_ else LowRank(b=b, a=a @ self.frame)

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors for a module (out, in), this offset, and this rank, at least 1."""
        short = min(out, in_)
        return {"a": (max(1, self.rank), short), "offset": (self.offset.shape[-2], short), "frame": (out, in_)}

    def unit(self, factor: str, scale: float | Tensor) -> float | Tensor:
        """The square root of the scale for a and the offset, in which the product is quadratic."""
        return 1.0 if factor == "frame" else scale**0.5

    def apply(self, x: Rows, dropped: Rows, scale: Tensor, base: Base) -> Float[Tensor, "*batch rows out"]:
        """scale times the matrix, applied to `dropped` as two factors."""
        pair = self.as_two_factors()
        return applied(dropped, pair.a, pair.b, scale)
