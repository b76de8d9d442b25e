"""Two factors and a small square one between them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import Base, LowRank, Rows, applied


@dataclass(frozen=True)
class ThreeFactor:
    """The matrix b @ c @ a, exactly, with a small c in the middle. Leading batch axes are allowed and must agree."""

    b: Float[Tensor, "*batch out rank"]
    c: Float[Tensor, "*batch rank rank"]
    a: Float[Tensor, "*batch rank in"]

    in_head: ClassVar[Literal[False]] = False
    reads_input: ClassVar[bool] = False
    structure: ClassVar[int] = 0

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

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors for a module (out, in) and this rank, at least 1."""
        rank = max(1, self.rank)
        return {"b": (out, rank), "a": (rank, in_), "c": (rank, rank)}

    def unit(self, factor: str, scale: float | Tensor) -> float | Tensor:
        """Factor between PEFT's factor and this one: b = scale * lora_B."""
        return scale if factor == "b" else 1.0

    def apply(self, x: Rows, dropped: Rows, scale: Tensor, base: Base) -> Float[Tensor, "*batch rows out"]:
        """scale * b c a dropped."""
        return applied(dropped, self.a, self.b, scale, self.c)
