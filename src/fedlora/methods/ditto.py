"""Ditto: each client trains an adapter of its own that is pulled towards the one that all average."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, pack, pick, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Round
from fedlora.method import Local, fit
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.scaled import Scaled, unscaled
from fedlora.ranges import NonNegativeFloat, PositiveInt, checked


@dataclass(frozen=True)
@checked
class Ditto:
    """The shared pair as in FedIT, and on each client a whole adapter of its own, which it uses instead.

    In a round a client first trains the shared pair, as in FedIT, bit for bit, and uploads it. Then it trains its own pair
    with the penalty pull / 2 (|b - b_shared|^2 + |a - a_shared|^2) over all modules, towards the shared pair as it came
    down; b and a are PEFT's, which are what is trained. Its own pair starts from the first shared pair that it gets; until
    then it uses the shared one. With `pull` 0 it trains locally and alone; with a pull without bounds it keeps to the
    shared pair.

    The paper trains whole models; here the distance is that of the trained factors, not that of the products. A round costs
    two trainings. A head that is not frozen is trained in both, and not pulled.

    Source: Li et al. 2021, arXiv:2012.04221, Algorithm 1.
    """

    rank: PositiveInt = 8
    pull: NonNegativeFloat = 0.1
    """Weight of the penalty that keeps the personal factors near the shared ones; 0: none."""

    def init_server(self, spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
        """A shared pair of update zero."""
        return self._shared().init_server(spec, seed)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Scaled:
        """No pair yet."""
        return Scaled({}, spec.scales(self.rank))

    def send(self, server: Tensors, client: ClientInfo, rnd: Round) -> Tensors:
        """The shared pair."""
        return server

    def view(self, state: Scaled, download: Tensors, client: ClientInfo) -> Adapter:
        """Its own pair, or the shared one as long as there is none."""
        return state.adapter or unpack(download, LowRank)

    def work(self, state: Scaled, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Scaled, Tensors]]:
        """Trains the shared pair, and uploads it; then its own, with the penalty."""
        shared = unpack(download, LowRank)
        trained = _pairs((yield from fit(shared)))
        penalty = partial(_pull, self.pull, state.scales, shared) if self.pull else None
        own = _pairs((yield from fit(state.adapter or shared, penalty=penalty)))
        return replace(state, adapter=own), pack(trained)

    def merge(self, server: Tensors, replies: Replies, rnd: Round) -> Merged[dict[str, Tensor]]:
        """The weighted mean of the shared pairs."""
        return self._shared().merge(server, replies, rnd)

    def _shared(self) -> FactorAveraging:
        return FactorAveraging(self.rank)


def _pull(strength: float, scales: Mapping[str, float], shared: Mapping[str, LowRank], live: Tensors) -> Tensor:
    return strength / 2 * distance(unscaled(unpack(pick(live, "ba"), LowRank), scales), unscaled(shared, scales))


def distance(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> Tensor:
    """The sum of |b - b'|^2 + |a - a'|^2 over all modules; on the device of the first."""
    apart = [
        (part.b - other[name].b.to(part.b)).square().sum() + (part.a - other[name].a.to(part.a)).square().sum()
        for name, part in one.items()
    ]
    return torch.stack(apart).sum()


def _pairs(adapter: Adapter) -> dict[str, LowRank]:
    return {name: part for name, part in adapter.items() if isinstance(part, LowRank)}
