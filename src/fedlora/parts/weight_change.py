"""The change of a module's weight, without factorization."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import Base, LowRank, Rows, beside_identity, times_transposed


@dataclass(frozen=True)
class WeightChange:
    """The matrix delta, which is added to the weight: training it is training the weight itself. Batch axes are allowed.

    The factor is not called w, since a request that trains w trains the task head.
    """

    delta: Float[Tensor, "*batch out in"]

    in_head: ClassVar[Literal[False]] = False
    reads_input: ClassVar[bool] = True
    structure: ClassVar[int] = 0

    @property
    def rank(self) -> int:
        """The largest rank that the matrix can have."""
        return min(self.delta.shape[-2:])

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The matrix itself."""
        return self.delta

    def as_two_factors(self) -> LowRank:
        """The matrix and an identity, exactly."""
        return beside_identity(self.delta)

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]:
        """The shape of the module's weight."""
        return {"delta": (out, in_)}

    def unit(self, factor: str, scale: float | Tensor) -> float | Tensor:
        """1: alpha does not apply to the weight itself."""
        return 1.0

    def apply(self, x: Rows, dropped: Rows, scale: Tensor, base: Base) -> Float[Tensor, "*batch rows out"]:
        """delta x: the dropout of LoRA does not apply to the weight itself."""
        return times_transposed(x, self.delta)
