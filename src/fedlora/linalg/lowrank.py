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

    def pair(self) -> "LowRank":
        """The same matrix as two factors: these."""
        return self


@dataclass(frozen=True)
class Tri:
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

    def pair(self) -> LowRank:
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
        return self.pair().product()

    def pair(self) -> LowRank:
        """The same matrix as two factors, core multiplied into b."""
        return LowRank(b=self.b @ block_diagonal(self.s[..., None, None] * self.c), a=self.a)


Product = LowRank | Tri | Heads
"""Every way to keep one matrix as factors."""


def block_diagonal(blocks: Float[Tensor, "*batch heads rank rank"]) -> Float[Tensor, "*batch ranks ranks"]:
    """The square matrix with these blocks on its diagonal, in their order, and zeros elsewhere."""
    heads, rank = blocks.shape[-3], blocks.shape[-1]
    one = torch.eye(heads, dtype=blocks.dtype, device=blocks.device)
    spread = blocks[..., :, :, None, :] * one[:, None, :, None]  # [*batch, head, row, other head, column]
    return spread.reshape(*blocks.shape[:-3], heads * rank, heads * rank)
