"""Ditto: each client trains a personal adapter with a proximal penalty toward the averaged one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, low_rank, pack, pick, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.methods.scaled import Scaled, unscaled
from fedlora.ranges import NonNegativeFloat, PositiveInt, checked


@dataclass(frozen=True)
@checked
class Ditto(Method[Tensors, Scaled, Mean]):
    """A shared adapter as in FedIT, and on each client a personal adapter, with which the client is evaluated.

    In a round a client first trains and uploads the shared adapter, bitwise as in FedIT. Then it trains its personal
    adapter with the penalty prox_weight / 2 (|b - b_shared|^2 + |a - a_shared|^2), summed over modules, toward the
    downloaded shared adapter; b and a are PEFT's `lora_B` and `lora_A`. The personal adapter starts from the first
    shared adapter that the client downloads. With `prox_weight` 0 the client trains alone; as `prox_weight` goes to
    infinity, its adapter is the shared one.

    The paper trains whole models; here the penalty is on the factors, not on the products. A round costs two trainings.
    A head that is not frozen is trained in both, without a penalty.

    Source: Li et al. 2021, arXiv:2012.04221, Algorithm 1.
    """

    rank: PositiveInt = 8
    prox_weight: NonNegativeFloat = 0.1
    """Weight of the penalty that keeps the personal factors near the shared ones; 0: none."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Tensors:
        """A shared adapter with zero update."""
        return pack(lora_init(spec, self.rank, seed))

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Scaled:
        """Empty: no personal adapter yet."""
        return Scaled({}, spec.scales(self.rank))

    def view(self, state: Scaled, download: Tensors, client: ClientInfo) -> Adapter:
        """The personal adapter, or the shared one before the client's first training."""
        return state.adapter or unpack(download, LowRank)

    def work(self, state: Scaled, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Scaled, Upload]]:
        """Trains and uploads the shared adapter; then trains the personal adapter with the penalty."""
        shared = unpack(download, LowRank)
        trained = low_rank((yield from fit(shared)))
        penalty = partial(_proximal, self.prox_weight, state.scales, shared) if self.prox_weight else None
        own = low_rank((yield from fit(state.adapter or shared, penalty=penalty, role="personal")))
        return replace(state, adapter=own), Upload(pack(trained))

    def merge(self, server: Tensors, collected: Mean, rnd: Round) -> Merged[Tensors]:
        """The weighted mean of the shared adapters."""
        return Merged(collected.tensors())

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The change of the shared product."""
        return changes(unpack(upload.values, LowRank), unpack(known.download, LowRank))


def _proximal(strength: float, scales: Mapping[str, float], shared: Mapping[str, LowRank], live: Tensors) -> Tensor:
    return strength / 2 * distance(unscaled(unpack(pick(live, "ba"), LowRank), scales), unscaled(shared, scales))


def distance(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> Tensor:
    """The sum of |b - b'|^2 + |a - a'|^2 over all modules; on the device of the first."""
    apart = [
        (part.b - other[name].b.to(part.b)).square().sum() + (part.a - other[name].a.to(part.a)).square().sum()
        for name, part in one.items()
    ]
    return torch.stack(apart).sum()
