"""FedHM-LoRA: balanced slices of the decomposed mean product, for clients of unequal capacity."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fedlora.adapter import AdapterSpec, Tensors, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.mean_update import MeanUpdate
from fedlora.messages import ClientInfo, Merged, Reply, Round
from fedlora.method import Method
from fedlora.methods.flexlora import Sliced
from fedlora.randomness import derive
from fedlora.ranges import PositiveFloat, PositiveInt, checked


@dataclass(frozen=True)
class _Collected:
    """The mean of the products, and the largest rank among the clients, which have weight 1 in it."""

    products: MeanUpdate = field(default_factory=MeanUpdate)
    largest: int = 0


@dataclass(frozen=True)
@checked
class FedHMLoRA(Method[Sliced, None, _Collected]):
    """The mean of the products is decomposed as u s vt; a client downloads the leading ranks of u s^1/2 and s^1/2 vt.

    FedHM decomposes whole weights, without LoRA; here its server is applied to updates b a. It is FlexLoRA with the
    balanced split and FedHM's weights, which do not depend on numbers of examples. With `weighting` "capacity", the
    weight of a client of rank r_k is proportional to exp(-g_k / `temperature`), g_k = rank / r_k. With "uniform", the
    default of the released code, all weights are equal.

    Law: without training, singular value j is multiplied each round by the weight of the clients whose rank reaches it.
    With `keep_missing`, as in FedHM, if no client of the largest rank participates, the server's factors are added to
    the mean as another client of that rank. A round with a single client then differs from local training.

    Source: Yao et al. 2021, arXiv:2111.14655.
    """

    rank: PositiveInt = 8
    weighting: Literal["capacity", "uniform"] = "capacity"
    """Client weights: by rank (capacity), or the same for all (uniform)."""
    temperature: PositiveFloat = 1.0
    """Temperature of the capacity weights; the higher, the more equal."""
    keep_missing: bool = False
    """Whether the server's factors are added to the mean if no client of the largest rank takes part."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Sliced:
        """Factors with zero update at the largest rank."""
        return Sliced.init(spec, self.rank, seed)

    def send(self, server: Sliced, client: ClientInfo, rnd: Round) -> Tensors:
        """The best fit at the client's rank."""
        return pack(server.leading(client.rank))

    def collect(self, server: Sliced, collected: _Collected | None, reply: Reply) -> _Collected:
        """The mean of the products; clients of weight zero have no part in it."""
        so_far = collected or _Collected()
        if not reply.weight > 0:
            return so_far
        return self._plus(so_far, reply.client.rank, unpack(reply.upload.values, LowRank))

    def merge(self, server: Sliced, collected: _Collected, rnd: Round) -> Merged[Sliced]:
        """The best fit to the mean of the products."""
        if self.keep_missing and 0 < collected.largest < self.rank:
            collected = self._plus(collected, self.rank, server.adapter)
        adapter = collected.products.best_fit(server.adapter, "balanced", derive(rnd.seed, "best_fit", rnd.index))
        return Merged(replace(server, adapter=adapter))

    def _plus(self, collected: _Collected, rank: int, update: Mapping[str, LowRank]) -> _Collected:
        """Adds a client. Those of the largest rank so far have weight 1, so that some weight is positive."""
        products, largest = collected.products, collected.largest
        if rank > largest:
            products, largest = products.times(self._share(largest, rank)) if largest else products, rank
        return _Collected(products.add(self._share(rank, largest), update), largest)

    def _share(self, rank: int, largest: int) -> float:
        """The weight of a client relative to one of rank `largest`."""
        apart = self.rank / largest - self.rank / rank
        return math.exp(apart / self.temperature) if self.weighting == "capacity" else 1.0
