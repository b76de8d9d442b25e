"""Matrices in factored form."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix b @ a, exactly, without a hidden scale. Leading batch axes are allowed and must agree."""

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
        """Returns the matrix itself, which has two factors."""
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

    b_i are adjacent columns of b, as many as c_i has, and a_i as many rows of a. Leading batch axes are allowed and must
    agree.
    """

    b: Float[Tensor, "*batch out ranks"]
    c: Float[Tensor, "*batch heads rank rank"]
    s: Float[Tensor, "*batch heads"]
    a: Float[Tensor, "*batch ranks in"]

    @property
    def rank(self) -> int:
        """Number of columns of `b`, which is the number of rows of `a`, over all heads."""
        return self.b.shape[-1]

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The dense matrix."""
        return self.as_two_factors().product()

    def as_two_factors(self) -> LowRank:
        """The same matrix as two factors, core multiplied into b."""
        return LowRank(b=self.b @ block_diagonal(self.s[..., None, None] * self.c), a=self.a)


@dataclass(frozen=True)
class Experts:
    """Several low-rank matrices and a router that mixes them for each input; hence there is no single matrix.

    x maps to sum_e w_e(x) b_e a_e x. The first expert, b a, is the own one, which is trained; the others are frozen.
    The rows of g are 2 experts - 1 slots: the first `experts` slots belong to the own expert, each of the others to one
    other expert. Leading batch axes are allowed and must agree.
    """

    b: Float[Tensor, "*batch out rank"]
    a: Float[Tensor, "*batch rank in"]
    g: Float[Tensor, "*batch slots in"]
    others_b: Float[Tensor, "*batch others out rank"]
    others_a: Float[Tensor, "*batch others rank in"]

    @property
    def rank(self) -> int:
        """The rank of each expert."""
        return self.b.shape[-1]

    def weights(self, x: Float[Tensor, "*batch rows in"]) -> Float[Tensor, "*batch rows experts"]:
        """The weight of each expert for each row of x, in at least fp32; weights sum to 1, and the first one is positive.

        The `experts` largest entries of the softmax over the slots are normalized again and summed for each expert. As
        the other experts together have only `experts` - 1 slots, the own expert always has a slot among them.
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
"""Any factored form of one matrix."""


def block_diagonal(blocks: Float[Tensor, "*batch heads rank rank"]) -> Float[Tensor, "*batch ranks ranks"]:
    """The square matrix with these blocks on its diagonal, in this order, and zeros elsewhere."""
    heads, rank = blocks.shape[-3], blocks.shape[-1]
    one = torch.eye(heads, dtype=blocks.dtype, device=blocks.device)
    blocked = blocks[..., :, :, None, :] * one[:, None, :, None]  # [*batch, head, row, other head, column]
    return blocked.reshape(*blocks.shape[:-3], heads * rank, heads * rank)
