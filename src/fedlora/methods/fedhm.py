"""FedHM-LoRA: balanced slices of the decomposed mean product, for clients of unequal capacity."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fedlora.adapter import Adapter, AdapterSpec, Tensors, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Round
from fedlora.method import Local, fit
from fedlora.methods.flexlora import Sliced
from fedlora.methods.ideal import MeanUpdate
from fedlora.randomness import derive
from fedlora.ranges import PositiveFloat, PositiveInt, checked


@dataclass(frozen=True)
@checked
class FedHMLoRA:
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

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> None:
        """Stateless."""

    def send(self, server: Sliced, client: ClientInfo, rnd: Round) -> Tensors:
        """The best fit at the client's rank."""
        return pack(server.leading(client.rank))

    def view(self, state: None, download: Tensors, client: ClientInfo) -> Adapter:
        """Downloaded adapter."""
        return unpack(download, LowRank)

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Tensors]]:
        """Trains both factors, and uploads them."""
        return state, pack((yield from fit(self.view(state, download, client))))

    def merge(self, server: Sliced, replies: Replies, rnd: Round) -> Merged[Sliced]:
        """The best fit to the mean of the products; the error is relative to this mean, with the server's share."""
        ideal, largest = MeanUpdate(), 0
        for reply in replies:
            if reply.weight > 0:
                ideal, largest = self._plus(ideal, largest, reply.client.rank, unpack(reply.upload, LowRank))
        if self.keep_missing and 0 < largest < self.rank:
            ideal, largest = self._plus(ideal, largest, self.rank, server.adapter)
        adapter = ideal.best_fit(server.adapter, "balanced", derive(rnd.seed, "best_fit", rnd.index))
        return Merged(replace(server, adapter=adapter), notes={"aggregation_error": ideal.error(adapter)})

    def _plus(self, ideal: MeanUpdate, largest: int, rank: int, update: Mapping[str, LowRank]) -> tuple[MeanUpdate, int]:
        """Adds a client, and updates the largest rank, whose clients have weight 1, so that not all weights underflow."""
        if rank > largest:
            ideal, largest = ideal.times(self._share(largest, rank)) if largest else ideal, rank
        return ideal.add(self._share(rank, largest), update), largest

    def _share(self, rank: int, largest: int) -> float:
        """The weight of a client relative to one of rank `largest`."""
        apart = self.rank / largest - self.rank / rank
        return math.exp(apart / self.temperature) if self.weighting == "capacity" else 1.0
