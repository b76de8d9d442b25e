"""Two factors, and the norms of the rows of the weight that they change (DoRA)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import Base, LowRank, Rows, applied


@dataclass(frozen=True)
class Dora:
    """The weight W becomes diag(m / n) (W + b a), where n are the norms of the rows of W + b a, which get no gradient.

    If m are the norms of the rows of W, and b = 0, W is unchanged. The change is not of low rank, and depends on W. A row
    whose norm is 0 stays 0. Leading batch axes are allowed and must agree.

    Source: Liu et al. 2024, arXiv:2402.09353, section 4.3.
    """

    b: Float[Tensor, "*batch out rank"]
    a: Float[Tensor, "*batch rank in"]
    m: Float[Tensor, "*batch out"]

    in_head: ClassVar[Literal[False]] = False
    reads_input: ClassVar[bool] = False
    structure: ClassVar[int] = 0

    @property
    def rank(self) -> int:
        """Number of columns of `b`, which is the number of rows of `a`."""
        return self.b.shape[-1]

    def product(self) -> None:
        """None: the change depends on W."""

    def as_two_factors(self) -> None:
        """None: the change depends on W."""

    def without_magnitudes(self) -> LowRank:
        """The two factors."""
        return LowRank(b=self.b, a=self.a)

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors for a module (out, in) and this rank, at least 1."""
        rank = max(1, self.rank)
        return {"b": (out, rank), "a": (rank, in_), "m": (out,)}

    def unit(self, factor: str, scale: float | Tensor) -> float | Tensor:
        """Factor between PEFT's factor and this one: b = scale * lora_B."""
        return scale if factor == "b" else 1.0

    def apply(self, x: Rows, dropped: Rows, scale: Tensor, base: Base) -> Float[Tensor, "*batch rows out"]:
        """(m / n - 1) W dropped + m / n scale b a dropped."""
        ratio = self._ratio(self.b * scale, base.weight(), base.row_norms()).unsqueeze(-2)  # [*batch, 1, out]
        product, update = base.product(), applied(dropped, self.a, self.b, scale)
        return (ratio - 1).to(product.dtype) * product + ratio.to(update.dtype) * update

    def changed(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """diag(m / n) (weight + b a)."""
        ratio = self._ratio(self.b, weight, weight.norm(dim=1))
        return ratio[:, None] * (weight + self.b @ self.a)

    def _ratio(self, b: Tensor, weight: Tensor, row_norms: Tensor) -> Float[Tensor, "*batch out"]:
        """m / n, in at least fp32."""
        with torch.no_grad():
            n = changed_row_norms(b, self.a, weight, row_norms)
        return self.m / n


def changed_row_norms(
    b: Float[Tensor, "*batch out rank"],
    a: Float[Tensor, "*batch rank in"],
    weight: Float[Tensor, "out in"],
    row_norms: Float[Tensor, " out"],
) -> Float[Tensor, "*batch out"]:
    """The norms of the rows of weight + b a, given those of `weight`, in at least fp32; positive also for rows of zeros.

    No matrix [out, in] is formed for each batch. If b = 0, the result is exactly `row_norms`.
    """
    dtype = torch.promote_types(b.dtype, torch.float32)
    b, a, weight, row_norms = (x.to(dtype) for x in (b, a, weight, row_norms))
    crossed = (b * (a @ weight.mT).mT).sum(-1)
    own = (b * (b @ (a @ a.mT))).sum(-1)
    return (row_norms.square() + 2 * crossed + own).clamp_min(torch.finfo(dtype).tiny).sqrt()
