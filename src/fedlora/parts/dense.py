"""Parameters of the task head."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """Parameter trained without factorization, of any shape: a weight or a bias of the task head."""

    w: Tensor

    in_head: ClassVar[Literal[True]] = True
    structure: ClassVar[int] = 0

    def shapes(self, *shape: int) -> dict[str, tuple[int, ...]]:
        """Shape of the factor for a parameter of this shape."""
        return {"w": shape}

    def unit(self, factor: str, scale: float | Tensor) -> float | Tensor:
        """1: the parameter itself is trained."""
        return 1.0
