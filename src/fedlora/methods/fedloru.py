"""FedLoRU, pFedLoRU and mFedLoRU: averaged factors whose product is merged into the base every few rounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, low_rank, pack, pick, unpack
from fedlora.linalg.combine import fresh_rows, stack
from fedlora.linalg.fit import truncate
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Reply, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.randomness import derive
from fedlora.ranges import NonNegativeInt, PositiveInt, checked

_IN_BASE = "in_base"  # an empty tensor of this name marks that the base already contains the factors' product


@dataclass(frozen=True)
class Shared:
    """The shared factors, and whether the base already contains their product."""

    factors: Mapping[str, LowRank]
    in_base: bool = False


@dataclass(frozen=True)
@checked
class FedLoRU(Method[Shared, Any, Any]):
    """The mean factors, as in FedIT; after every `every` rounds (tau; 0: never) their product is merged into the base.

    Each such base update has rank r, and messages keep rank r. With `accumulate` "keep", as in the paper's algorithm,
    training continues from the same factors, and hence from the base + 2 b a. With "reinit" it continues from b = 0 and
    a new random a, and hence from the base + b a. After such a round, the evaluated model is the base alone, with both
    settings (the model that the paper returns).

    The mean of the factors is inexact, and its error persists in the base. The released code starts from a random
    product on a base of zeros; here training starts from b = 0 on the pretrained base.

    Source: Park and Klabjan 2024, arXiv:2409.12371, Algorithm 1, in which b is called A, and a is called B.
    """

    rank: PositiveInt = 8
    every: NonNegativeInt = 10
    """The number of rounds between two updates of the base; 0: never."""
    accumulate: Literal["keep", "reinit"] = "keep"
    """After an update of the base, keep the factors (keep), or restart from b = 0 and a new random a (reinit)."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Shared:
        """Factors with zero update."""
        return Shared(lora_init(spec, self.rank, seed))

    def send(self, server: Shared, client: ClientInfo, rnd: Round) -> Tensors:
        """The factors, and a mark if the base contains them; the round loop sends the base update."""
        mark = {_IN_BASE: torch.empty(0)} if server.in_base else {}
        return {**pack(server.factors), **mark}

    def view(self, state: Any, download: Tensors, client: ClientInfo) -> Adapter:
        """The factors, or a zero update if the base contains them."""
        return _beyond_base(download)

    def work(self, state: Any, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Any, Upload]]:
        """Trains the factors, and uploads them."""
        return state, Upload(pack((yield from fit(_factors(download)))))

    def merge(self, server: Shared, collected: Mean, rnd: Round) -> Merged[Shared]:
        """The mean factors; every `every` rounds also as a base update."""
        mean = unpack(collected.tensors(), LowRank)
        if not self.every or (rnd.index + 1) % self.every:
            return Merged(Shared(mean))
        if self.accumulate == "keep":
            return Merged(Shared(mean, in_base=True), mean)
        return Merged(Shared({name: _fresh(name, part, rnd) for name, part in mean.items()}), mean)

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The product of the upload minus the update that the download adds to the base."""
        return changes(unpack(upload.values, LowRank), _beyond_base(known.download))


@dataclass(frozen=True)
class PFedLoRU(FedLoRU):
    """FedLoRU with an additional personal adapter of rank `personal_rank`, which is never sent.

    A client trains its personal adapter on the downloaded model, then the shared adapter with the personal one frozen.
    With `personal_rank` 0 this is FedLoRU. A client that has never participated is evaluated with the global model. The
    paper's text was not available: the order and the initial personal adapter are this package's choice.

    Source: Park and Klabjan 2024, arXiv:2409.12371.
    """

    personal_rank: NonNegativeInt = 4
    """The rank of the personal factors; 0: none."""

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> dict[str, LowRank]:
        """A personal adapter with zero update."""
        return lora_init(spec, self.personal_rank, derive(seed, "personal")) if self.personal_rank else {}

    def view(self, state: Mapping[str, LowRank], download: Tensors, client: ClientInfo) -> Adapter:
        """The sum of both adapters, as concatenated factors."""
        shared = _beyond_base(download)
        return {n: stack([(1.0, part), (1.0, state[n])]) if n in state else part for n, part in shared.items()}

    def work(
        self, state: Mapping[str, LowRank], download: Tensors, client: ClientInfo, rnd: Round
    ) -> Local[tuple[Mapping[str, LowRank], Upload]]:
        """Trains the personal adapter with the shared one frozen, then vice versa; uploads the shared one."""
        shared = _factors(download)
        if state:
            state = low_rank((yield from fit(state, frozen_extra=shared, role="personal")))
        return state, Upload(pack((yield from fit(shared, frozen_extra=state))))


@dataclass(frozen=True)
class MFedLoRU(FedLoRU):
    """FedLoRU for clients whose rank r_k is below the server's: they upload their changes of b and of a at rank r_k.

    The change of b [out, rank] is sent as [out, r_k] and [r_k, rank], that of a [rank, in] as [rank, r_k] and [r_k,
    in]. The server adds the mean of the products to b and to a. With r_k = rank this is FedLoRU. In the paper the
    client trains the factors of the changes; here it trains b and a, and sends the best fit of rank r_k to each change,
    which reduces traffic but not the cost of training. The paper's formulas for this variant were not available.

    Source: Park and Klabjan 2024, arXiv:2409.12371.
    """

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> dict[str, int]:
        """The rank of each module's changes; constant."""
        return {name: spec.rank(name, client.rank) for name in spec.modules}

    def work(
        self, state: Mapping[str, int], download: Tensors, client: ClientInfo, rnd: Round
    ) -> Local[tuple[Mapping[str, int], Upload]]:
        """Trains the factors, and uploads both changes in factored form."""
        start = _factors(download)
        trained = low_rank((yield from fit(start)))
        moves: dict[str, LowRank] = {}
        for name, part in trained.items():
            moves[f"{name}.b"] = truncate(part.b - start[name].b, state[name], "balanced")
            moves[f"{name}.a"] = truncate(part.a - start[name].a, state[name], "balanced")
        return state, Upload(pack(moves))

    def collect(self, server: Shared, collected: Mean | None, reply: Reply) -> Mean:
        """The mean of the clients' factors after training."""
        so_far = collected or Mean()
        so_far.add(reply.weight, pack(_moved(server.factors, reply.upload)), reply.client.id)
        return so_far

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The product after the uploaded changes minus the update that the download adds to the base."""
        return changes(_moved(_factors(known.download), upload), _beyond_base(known.download))


def _moved(start: Mapping[str, LowRank], upload: Upload) -> dict[str, LowRank]:
    """The factors after uploaded changes at a client's rank."""
    moves = unpack(upload.values, LowRank)
    return {
        name: LowRank(b=part.b + moves[f"{name}.b"].product(), a=part.a + moves[f"{name}.a"].product())
        for name, part in start.items()
    }


def _factors(download: Tensors) -> dict[str, LowRank]:
    return unpack(pick(download, "ba"), LowRank)


def _beyond_base(download: Tensors) -> dict[str, LowRank]:
    """The update that the factors add to the current base."""
    factors = _factors(download)
    if _IN_BASE not in download:
        return factors
    return {name: LowRank(b=torch.zeros_like(part.b), a=part.a) for name, part in factors.items()}


def _fresh(name: str, part: LowRank, rnd: Round) -> LowRank:
    a = fresh_rows((part.rank, part.a.shape[-1]), rnd.rng(f"accumulate {name}"))
    return LowRank(b=torch.zeros_like(part.b), a=a.to(part.a))
