"""An example of every kind of part that changes what a module computes."""

import torch
from torch import Tensor

from fedlora.linalg.lowrank import LowRank
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
    }
