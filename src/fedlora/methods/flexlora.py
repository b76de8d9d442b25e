"""FlexLoRA and FRA-LoRA: the mean of the products, truncated to each client's rank by singular value decomposition."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fedlora.adapter import AdapterSpec, Tensors, lora_init, low_rank, pack, unpack
from fedlora.linalg.combine import leading
from fedlora.linalg.fit import Split
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.mean_update import MeanUpdate
from fedlora.messages import ClientInfo, Mean, Merged, Reply, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.parts.dense import Dense
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
class FlexLoRA(Method[Sliced, None, MeanUpdate | Mean]):
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

    def send(self, server: Sliced, client: ClientInfo, rnd: Round) -> Tensors:
        """The best fit at the client's rank."""
        return pack(server.leading(client.rank))

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Upload]]:
        """Trains both factors; uploads them, or their product."""
        trained = low_rank((yield from fit(self.view(state, download, client))))
        if self.upload == "factors":
            return state, Upload(pack(trained))
        return state, Upload(pack({name: Dense(part.product()) for name, part in trained.items()}))

    @property
    def collects_mean(self) -> bool:
        """Whether clients upload products."""
        return self.upload == "dense"

    def collect(self, server: Sliced, collected: MeanUpdate | Mean | None, reply: Reply) -> MeanUpdate:
        """The mean of the products."""
        so_far = collected if isinstance(collected, MeanUpdate) else MeanUpdate()
        return so_far.add(reply.weight, unpack(reply.upload.values, LowRank))

    def merge(self, server: Sliced, collected: MeanUpdate | Mean, rnd: Round) -> Merged[Sliced]:
        """The best fit at the server's rank to the mean of the products."""
        if isinstance(collected, Mean):
            products = unpack(collected.tensors(), Dense)
            collected = MeanUpdate.of({name: part.w for name, part in products.items()})
        adapter = collected.best_fit(server.adapter, self.split, derive(rnd.seed, "best_fit", rnd.index))
        return Merged(replace(server, adapter=adapter))

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The product of the upload minus that of the download."""
        if self.upload == "factors":
            after = unpack(upload.values, LowRank)
        else:
            products = unpack(upload.values, Dense)
            after = {name: LowRank(b=part.w, a=torch.eye(part.w.shape[-1]).to(part.w)) for name, part in products.items()}
        return changes(after, unpack(known.download, LowRank))


@dataclass(frozen=True)
class FRALoRA(FlexLoRA):
    """FlexLoRA's merge for clients of equal ranks; only the default of `split` differs, which the paper does not specify.

    The update is relative to the pretrained weights. The paper describes dense uploads; the default here are the
    factors, the same information in r (out + in) floats.

    Source: Trautmann et al. 2025, arXiv:2501.06332.
    """

    split: Split = "balanced"
