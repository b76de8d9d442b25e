"""An example of every kind of part that changes what a module computes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.linalg.lowrank import LowRank
from fedlora.parts.dora import Dora
from fedlora.parts.experts import Experts
from fedlora.parts.heads import Heads
from fedlora.parts.table import Part
from fedlora.parts.three_factor import ThreeFactor
from fedlora.parts.tied import Tied
from fedlora.parts.weight_change import WeightChange


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal entries, fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def examples(out: int, in_: int, rank: int) -> dict[type, Part]:
    """Kind -> a part for a module of that size; Heads and Experts have `rank` heads and ranks."""
    b, a, n = drawn(out, rank), drawn(rank, in_), rank
    return {
        LowRank: LowRank(b, a),
        ThreeFactor: ThreeFactor(b, drawn(n, n), a),
        Heads: Heads(drawn(out, 2 * n), drawn(n, 2, 2), drawn(n), drawn(2 * n, in_)),
        Experts: Experts(b, a, drawn(5, in_), drawn(2, out, n), drawn(2, n, in_)),
        Tied: Tied(drawn(n, min(out, in_)), drawn(n, min(out, in_), seed=1), drawn(out, in_)),
        WeightChange: WeightChange(drawn(out, in_)),
        Dora: Dora(b, a, drawn(out).abs()),
    }


@dataclass(frozen=True)
class Linear:
    """A frozen weight, applied to x: vectors or token ids."""

    matrix: Tensor
    x: Tensor

    def product(self) -> Tensor:
        return self.x @ self.matrix.mT if self.x.is_floating_point() else self.matrix.mT[self.x]

    def weight(self) -> Tensor:
        return self.matrix

    def row_norms(self) -> Tensor:
        return self.matrix.norm(dim=1)


def update(part: Part, x: Tensor, dropped: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """The part's update beside a weight of this size."""
    return part.apply(x, dropped, scale, Linear(drawn(*size, seed=5), dropped))
