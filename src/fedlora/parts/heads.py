"""Heads: several small square factors, each between its own columns of b and rows of a."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import Base, LowRank, Rows, applied, block_diagonal


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

    in_head: ClassVar[Literal[False]] = False
    reads_input: ClassVar[bool] = False

    @property
    def rank(self) -> int:
        """Number of columns of `b`, which is the number of rows of `a`, over all heads."""
        return self.b.shape[-1]

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The dense matrix."""
        return self.as_two_factors().product()

    def as_two_factors(self) -> LowRank:
        """The same matrix as two factors, core multiplied into b."""
        return LowRank(b=self.b @ self._core(), a=self.a)

    @property
    def structure(self) -> int:
        """The rank of a head: padding with zeros can add heads, but not ranks of a head."""
        return self.c.shape[-1]

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors for a module (out, in), this number of heads, and this rank, all at least 1."""
        rank, heads = max(1, self.rank), max(1, len(self.s))
        return {"b": (out, rank), "a": (rank, in_), "c": (heads, rank // heads, rank // heads), "s": (heads,)}

    def unit(self, factor: str, scale: float | Tensor) -> float | Tensor:
        """Factor between PEFT's factor and this one: b = scale * lora_B."""
        return scale if factor == "b" else 1.0

    def apply(self, x: Rows, dropped: Rows, scale: Tensor, base: Base) -> Float[Tensor, "*batch rows out"]:
        """scale * b core a dropped."""
        return applied(dropped, self.a, self.b, scale, self._core())

    def _core(self) -> Float[Tensor, "*batch ranks ranks"]:
        return block_diagonal(self.s[..., None, None] * self.c)
