"""LoRA-FAIR: averages the factors, and corrects b so that the product approximates the mean of the products."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, Tensors, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.mean_update import Updates, alike, batch, unbatch
from fedlora.linalg.ridge_correction import CosineLoss, corrected, descend
from fedlora.linalg.weighted_terms import Terms
from fedlora.messages import ClientInfo, Merged, Reply, Round
from fedlora.method import Method
from fedlora.methods.scaled import Scaled, scaled, unscaled
from fedlora.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, checked


@dataclass(frozen=True)
@checked
class LoRAFAIR(Method[Scaled, None, tuple[tuple[float, Updates], ...]]):
    """The adapter becomes (b_mean + d, a_mean) with the d that minimizes S(M, (b_mean + d) a_mean) + strength |d|^2.

    M = sum_k w_k b_k a_k; all factors are PEFT's, without the scale alpha / rank. Law: no d can reproduce the part of M
    outside the row space of a_mean. d = 0 if the clients have a common a, for which the merge is exact, and for an
    infinite strength.

    `loss` is S. "ridge" is the squared distance, solved in closed form. "cos", the paper's (equation 8), is one minus
    the cosine of the two matrices, and "cos_col" the mean over their columns, as in code derived from the authors';
    both are minimized by `steps` gradient steps at `rate`. They do not depend on the norm of the product, and at a
    fixed rate a small b can grow severalfold while its direction improves, so they are not the default. If the final
    loss exceeds the initial one, b_mean is used.

    `strength` is the paper's lambda; with 1.0, as in the derived code, b hardly changes. `norm` "l2" does not square
    |d| (the paper is ambiguous); ridge always does. `init` "xavier" starts from a random matrix instead of b_mean, as
    in the derived code; its influence persists if `strength` is small, and its result is always used. All clients have
    the same rank. All uploads are needed at once, so memory grows with the clients.

    Source: Bian et al. 2025, arXiv:2411.14961, section 4.
    """

    rank: PositiveInt = 8
    loss: Literal["ridge", "cos", "cos_col"] = "ridge"
    """The distance that the correction reduces: squared (ridge), one minus the cosine (cos), or that averaged over
    columns (cos_col)."""
    strength: NonNegativeFloat = 0.01
    """Weight of the penalty on the correction."""
    norm: Literal["l2sq", "l2"] = "l2sq"
    """Whether the penalty is the squared norm of the correction (l2sq) or the norm itself (l2); ridge always squares
    it."""
    init: Literal["zero", "xavier"] = "zero"
    """Where gradient steps start: at the averaged b (zero), or at a random b (xavier)."""
    steps: PositiveInt = 1000
    """The number of gradient steps; ridge needs none."""
    rate: PositiveFloat = 0.01
    """The learning rate of the gradient steps."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Scaled:
        """Factors with zero update."""
        return Scaled.init(spec, self.rank, seed)

    def send(self, server: Scaled, client: ClientInfo, rnd: Round) -> Tensors:
        """The adapter."""
        return pack(server.adapter)

    def collect(
        self, server: Scaled, collected: tuple[tuple[float, Updates], ...] | None, reply: Reply
    ) -> tuple[tuple[float, Updates], ...]:
        """All uploads, with PEFT's b, and their weights."""
        return (*(collected or ()), (reply.weight, unscaled(unpack(reply.upload.values, LowRank), server.scales)))

    def merge(self, server: Scaled, collected: tuple[tuple[float, Updates], ...], rnd: Round) -> Merged[Scaled]:
        """The averaged factors with corrected b."""
        found: dict[str, LowRank] = {}
        for names in alike(server.adapter):
            terms = [(weight, batch(update, names)) for weight, update in collected]
            better = self._corrected(terms, rnd.rng(f"lora-fair {names[0]}"))
            found |= unbatch(better, names, terms[0][1].b.dtype)
        return Merged(replace(server, adapter=scaled({name: found[name] for name in server.adapter}, server.scales)))

    def _corrected(self, terms: Terms, rng: torch.Generator) -> LowRank:
        if self.loss == "ridge":
            return corrected(terms, self.strength)
        loss = CosineLoss(terms, self.strength, self.loss == "cos_col", self.norm == "l2sq")
        if self.init == "xavier":
            return descend(loss, self.steps, self.rate, loss.center.b + _xavier(loss.center.b, rng))
        found = descend(loss, self.steps, self.rate)
        better = loss.value(found.b) < loss.value(loss.center.b)  # [module]
        return LowRank(b=torch.where(better[:, None, None], found.b, loss.center.b), a=found.a)


def _xavier(template: Tensor, rng: torch.Generator) -> Tensor:
    """Uniform in +-sqrt(6 / (out + rank)), shaped as b [module, out, rank]."""
    bound = math.sqrt(6 / sum(template.shape[-2:]))
    return bound * (2 * torch.rand(template.shape, generator=rng) - 1).to(template)
