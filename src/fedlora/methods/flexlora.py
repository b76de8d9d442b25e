"""FlexLoRA and FRA-LoRA: the mean of the products, truncated to each client's rank by singular value decomposition."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fedlora.adapter import Adapter, AdapterSpec, Dense, Tensors, lora_init, pack, unpack
from fedlora.linalg.combine import leading
from fedlora.linalg.fit import Split
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Round
from fedlora.method import Local, fit
from fedlora.methods.ideal import MeanUpdate
from fedlora.randomness import derive
from fedlora.ranges import PositiveInt, checked


@dataclass(frozen=True)
class Sliced:
    """The server's factors, whose leading ranks a client downloads, and the fixed ranks of some modules."""

    adapter: Mapping[str, LowRank]
    fixed: Mapping[str, int]

    @staticmethod
    def init(spec: AdapterSpec, rank: int, seed: int) -> "Sliced":
        """LoRA's initialization, at the server's rank."""
        return Sliced(lora_init(spec, rank, seed), spec.rank_pattern)

    def leading(self, rank: int) -> dict[str, LowRank]:
        """The part that a client of this rank downloads."""
        return {name: leading(part, self.fixed.get(name, rank)) for name, part in self.adapter.items()}


@dataclass(frozen=True)
@checked
class FlexLoRA:
    """Client i downloads the best approximation of rank r_i to M = sum_k w_k b_k a_k; the clients' ranks may differ.

    One decomposition at the server's `rank` serves all clients: the best fit of a smaller rank is its leading part. The
    merge is exact if `rank` is at least that of M; else it loses the truncated singular values. Law: without training,
    singular value j is multiplied each round by the total weight of the clients whose rank reaches it.

    `split` "left", as in the paper, puts the singular values into b; "balanced" puts their square roots into each
    factor. With `upload` "dense", a client sends the product [out, in]: the result is the same, and the server needs
    only a mean of uploads.

    Source: Bai et al. 2024, arXiv:2402.11505, section 3. The released code does not apply unequal ranks.
    """

    rank: PositiveInt = 8
    split: Split = "left"
    """How the best fit is split into factors. left: the singular values go into b. balanced: their square roots go into
    both factors."""
    upload: Literal["factors", "dense"] = "factors"
    """What clients upload: their factors, or the dense product, which needs only sums of uploads."""

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
        """Trains both factors; uploads them, or their product."""
        trained = yield from fit(self.view(state, download, client))
        if self.upload == "factors":
            return state, pack(trained)
        return state, pack({name: Dense(part.product()) for name, part in trained.items() if isinstance(part, LowRank)})

    def merge(self, server: Sliced, replies: Replies, rnd: Round) -> Merged[Sliced]:
        """The best fit at the server's rank to the mean of the products."""
        ideal = self._ideal(replies)
        adapter = ideal.best_fit(server.adapter, self.split, derive(rnd.seed, "best_fit", rnd.index))
        return Merged(replace(server, adapter=adapter), notes={"aggregation_error": ideal.error(adapter)})

    def _ideal(self, replies: Replies) -> MeanUpdate:
        if self.upload == "dense":
            return MeanUpdate.of({name: part.w for name, part in unpack(replies.mean(), Dense).items()})
        ideal = MeanUpdate()
        for reply in replies:
            ideal = ideal.add(reply.weight, unpack(reply.upload, LowRank))
        return ideal


@dataclass(frozen=True)
class FRALoRA(FlexLoRA):
    """FlexLoRA's merge for clients of equal ranks; only the default of `split` differs, which the paper does not specify.

    The update is relative to the pretrained weights. The paper describes dense uploads; the default here are the
    factors, the same information in r (out + in) floats.

    Source: Trautmann et al. 2025, arXiv:2501.06332.
    """

    split: Split = "balanced"
