"""A mixture of low-rank experts."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import Base, LowRank, Rows, applied, times_transposed


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

    in_head: ClassVar[Literal[False]] = False
    reads_input: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        """The rank of each expert."""
        return self.b.shape[-1]

    def weights(self, x: Rows) -> Float[Tensor, "*batch rows experts"]:
        """The weight of each expert for each row of x, in at least fp32; weights sum to 1, and the first one is positive.

        The `experts` largest entries of the softmax over the slots are normalized again and summed for each expert. As
        the other experts together have only `experts` - 1 slots, the own expert always has a slot among them.
        """
        experts = self.others_b.shape[-3] + 1
        logits = times_transposed(x, self.g)
        best = logits.to(torch.promote_types(logits.dtype, torch.float32)).topk(experts, -1)
        slots = torch.zeros_like(logits, dtype=best.values.dtype).scatter(-1, best.indices, best.values.softmax(-1))
        return torch.cat([slots[..., :experts].sum(-1, keepdim=True), slots[..., experts:]], -1)

    def concat_factors(self) -> LowRank:
        """The sum of all experts, the own one first, each with `rank` columns of b and rows of a."""
        b = torch.cat([self.b.unsqueeze(-3), self.others_b], -3)  # [*batch, experts, out, rank]
        a = torch.cat([self.a.unsqueeze(-3), self.others_a], -3)  # [*batch, experts, rank, in]
        return LowRank(b=b.transpose(-3, -2).flatten(-2), a=a.flatten(-3, -2))

    @property
    def structure(self) -> int:
        """The number of slots, which padding with zeros would change."""
        return len(self.g)

    def product(self) -> None:
        """None: there is no single matrix."""

    def as_two_factors(self) -> None:
        """None: there is no single matrix."""

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors for a module (out, in), this number of experts, and this rank, at least 1."""
        rank, others = max(1, self.rank), len(self.others_b)
        return {
            "b": (out, rank),
            "a": (rank, in_),
            "g": (2 * others + 1, in_),
            "others_b": (others, out, rank),
            "others_a": (others, rank, in_),
        }

    def unit(self, factor: str, scale: float | Tensor) -> float | Tensor:
        """Factor between PEFT's factor and this one: b = scale * lora_B; `others_b` is not scaled."""
        return scale if factor == "b" else 1.0

    def apply(self, x: Rows, dropped: Rows, scale: Tensor, base: Base) -> Float[Tensor, "*batch rows out"]:
        """sum_e w_e(x) b_e a_e dropped, in one product for all experts, with the own b times `scale`."""
        factors = (self.b * scale, self.a, self.g, self.others_b, self.others_a)
        dtype = x.dtype if x.is_floating_point() else self.b.dtype
        experts = Experts(*(factor.to(dtype) for factor in factors))
        pair = experts.concat_factors()
        return applied(dropped, pair.a, pair.b, experts.weights(x).repeat_interleave(experts.rank, -1))
