"""The server's choice of ranks, the same for all clients of a round, by the changes that it has merged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fedlora.adapter import AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.methods.flexlora import Sliced


@dataclass(frozen=True)
class RankScores:
    """The server's factors, the fixed ranks of some modules, and the scores of all ranks, module by module.

    `scores` has a tensor [ranks] for each side, "b" and "a": a rank's score is that of the last round that changed this
    factor of it, 0 if there was none.
    """

    adapter: Mapping[str, LowRank]
    fixed: Mapping[str, int]
    scores: Tensors

    @staticmethod
    def init(spec: AdapterSpec, rank: int, seed: int) -> "RankScores":
        """LoRA's initialization; no rank has been trained."""
        start = Sliced.init(spec, rank, seed)
        ranks = sum(part.rank for part in start.adapter.values())
        return RankScores(start.adapter, start.fixed, {side: torch.zeros(ranks, dtype=spec.dtype) for side in "ba"})

    def first(self, side: str, rank: int) -> Int64[Tensor, " chosen"]:
        """The positions of the ranks to be trained in a round of this side, `rank` for each module on average.

        Ranks that were never changed come first, the first rank of every module before the second ones; then the others,
        in the order of their scores. Equal scores are in the former order.
        """
        within = torch.cat([torch.arange(part.rank) for part in self.adapter.values()])
        by_rank = within.argsort(stable=True)
        scores = self.scores[side].cpu()
        urgent = scores.where(scores > 0, torch.inf)[by_rank]
        order = by_rank[urgent.argsort(descending=True, stable=True)]
        return order[: sum(self.fixed.get(name, rank) for name in self.adapter)]

    def changed(self, adapter: Mapping[str, LowRank], side: str, scores: Float[Tensor, " ranks"]) -> "RankScores":
        """The state after a round with these scores; ranks of score 0, which nobody has changed, keep their former one."""
        return replace(
            self, adapter=adapter, scores={**self.scores, side: scores.where(scores > 0, self.scores[side].to(scores))}
        )


def mask_of(positions: Int64[Tensor, " chosen"], total: int) -> Bool[Tensor, " total"]:
    """Whether each of `total` ranks is among the positions."""
    return torch.zeros(total, dtype=torch.bool).index_fill(0, positions, True)
