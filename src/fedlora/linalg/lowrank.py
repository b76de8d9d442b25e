"""Matrices kept as factors."""

from dataclasses import dataclass

import torch
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

    def as_two_factors(self) -> "LowRank":
        """The same matrix as two factors: these."""
        return self


@dataclass(frozen=True)
class ThreeFactor:
    """The matrix b @ c @ a, exactly, with a small c in the middle. Leading batch axes are allowed and must agree."""

    b: Float[Tensor, "*batch out rank"]
    c: Float[Tensor, "*batch rank rank"]
    a: Float[Tensor, "*batch rank in"]

    @property
    def rank(self) -> int:
        """Number of columns of `b`, which is the number of rows of `a`."""
        return self.b.shape[-1]

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The dense matrix."""
        return self.b @ self.c @ self.a

    def as_two_factors(self) -> LowRank:
        """The same matrix as two factors, c multiplied into b."""
        return LowRank(b=self.b @ self.c, a=self.a)


@dataclass(frozen=True)
class Heads:
    """The matrix sum_i s_i b_i c_i a_i over heads i, exactly: b @ core @ a with the s_i c_i as blocks on core's diagonal.

    b_i are `rank` columns of b next to each other, a_i as many rows of a. Leading batch axes are allowed and must agree.
    """

    b: Float[Tensor, "*batch out ranks"]
    c: Float[Tensor, "*batch heads rank rank"]
    s: Float[Tensor, "*batch heads"]
    a: Float[Tensor, "*batch ranks in"]

    @property
    def rank(self) -> int:
        """Number of columns of `b`, which is the number of rows of `a`: those of all heads together."""
        return self.b.shape[-1]

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The dense matrix."""
        return self.as_two_factors().product()

    def as_two_factors(self) -> LowRank:
        """The same matrix as two factors, core multiplied into b."""
        return LowRank(b=self.b @ block_diagonal(self.s[..., None, None] * self.c), a=self.a)


@dataclass(frozen=True)
class Experts:
    """Several low-rank matrices, of which a router gives each input its own mixture: no fixed matrix, hence no product.

    x maps to sum_e w_e(x) b_e a_e x. The first expert is b a, the own one; the others are meant to be left as they are. The
    rows of g are slots, 2 experts - 1: the first `experts` ones all stand for the own expert, the rest for one other each.
    Leading batch axes are allowed and must agree.
    """

    b: Float[Tensor, "*batch out rank"]
    a: Float[Tensor, "*batch rank in"]
    g: Float[Tensor, "*batch slots in"]
    others_b: Float[Tensor, "*batch others out rank"]
    others_a: Float[Tensor, "*batch others rank in"]

    @property
    def rank(self) -> int:
        """That of each expert."""
        return self.b.shape[-1]

    def shares(self, x: Float[Tensor, "*batch rows in"]) -> Float[Tensor, "*batch rows experts"]:
        """How much each expert counts for each row of x, in at least fp32: 1 in sum, above 0 for the own one, the first.

        The `experts` largest of the softmax over the slots, normalised again (that is: the softmax of these alone), added
        up for each expert. There is one slot less for the others than is taken, so that the own expert always counts.
        """
        experts = self.others_b.shape[-3] + 1
        logits = x @ self.g.mT
        best = logits.to(torch.promote_types(logits.dtype, torch.float32)).topk(experts, -1)
        slots = torch.zeros_like(logits, dtype=best.values.dtype).scatter(-1, best.indices, best.values.softmax(-1))
        return torch.cat([slots[..., :experts].sum(-1, keepdim=True), slots[..., experts:]], -1)

    def concat_factors(self) -> LowRank:
        """The sum of all experts, the own one first, each with `rank` columns of b and rows of a."""
        b = torch.cat([self.b.unsqueeze(-3), self.others_b], -3)  # [*batch, experts, out, rank]
        a = torch.cat([self.a.unsqueeze(-3), self.others_a], -3)  # [*batch, experts, rank, in]
        return LowRank(b=b.transpose(-3, -2).flatten(-2), a=a.flatten(-3, -2))


Product = LowRank | ThreeFactor | Heads
"""Every way to keep one matrix as factors."""


def block_diagonal(blocks: Float[Tensor, "*batch heads rank rank"]) -> Float[Tensor, "*batch ranks ranks"]:
    """The square matrix with these blocks on its diagonal, in their order, and zeros elsewhere."""
    heads, rank = blocks.shape[-3], blocks.shape[-1]
    one = torch.eye(heads, dtype=blocks.dtype, device=blocks.device)
    spread = blocks[..., :, :, None, :] * one[:, None, :, None]  # [*batch, head, row, other head, column]
    return spread.reshape(*blocks.shape[:-3], heads * rank, heads * rank)
