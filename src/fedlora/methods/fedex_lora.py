"""FedEx-LoRA: averages the factors, and merges their residual to the mean of the products into the base."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fedlora.adapter import AdapterSpec, Tensors, lora_init, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.mean_update import MeanUpdate
from fedlora.messages import ClientInfo, Mean, Merged, Reply, Round
from fedlora.method import Method
from fedlora.randomness import derive
from fedlora.ranges import NonNegativeInt, PositiveInt, checked


@dataclass(frozen=True)
class _Collected:
    """The means of the factors, and of the products."""

    factors: Mean
    products: MeanUpdate


@dataclass(frozen=True)
@checked
class FedExLoRA(Method[Mapping[str, LowRank], None, _Collected]):
    """The adapter becomes (b_mean, a_mean), and E = sum_k w_k b_k a_k - b_mean a_mean is merged into the base: exact.

    E is a covariance of rank at most (K - 1) r for K clients, and is sent as factors of that rank, or as the dense matrix
    if that is smaller. With a `residual_rank` above 0, only the best approximation of that rank is merged into the base
    (the paper's variant for many clients); the remainder is lost.

    `adapter` "mean" is the published choice. With any other adapter the sum is exact, too: "best" is the best fit of
    rank r to the mean of the products, and the remainder, again of rank at most (K - 1) r, is merged into the base.

    Paper and code weigh clients equally (`method.weights` "uniform"). All clients have the same rank. The released code
    adds the transpose of E to linear layers; this one adds E.

    Source: Singhal et al. 2025, arXiv:2410.09432, section 4.
    """

    rank: PositiveInt = 8
    adapter: Literal["mean", "best"] = "mean"
    """The new adapter: the averaged factors (mean), or the best fit to the mean of the products (best)."""
    residual_rank: NonNegativeInt = 0
    """The rank of the residual that is added to the base; 0: the exact residual."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Mapping[str, LowRank]:
        """Factors with zero update."""
        return lora_init(spec, self.rank, seed)

    def send(self, server: Mapping[str, LowRank], client: ClientInfo, rnd: Round) -> Tensors:
        """The adapter; the round loop sends the base update."""
        return pack(server)

    def collect(self, server: Mapping[str, LowRank], collected: _Collected | None, reply: Reply) -> _Collected:
        """The means of the factors, and of the products."""
        so_far = collected or _Collected(Mean(), MeanUpdate())
        so_far.factors.add(reply.weight, reply.upload.values, reply.client.id)
        return replace(so_far, products=so_far.products.add(reply.weight, unpack(reply.upload.values, LowRank)))

    def merge(self, server: Mapping[str, LowRank], collected: _Collected, rnd: Round) -> Merged[Mapping[str, LowRank]]:
        """The adapter, and its residual to the mean of the products as a base update."""
        if self.adapter == "mean":
            adapter = unpack(collected.factors.tensors(), LowRank)
        else:
            adapter = collected.products.best_fit(server, seed=derive(rnd.seed, "best_fit", rnd.index))
        return Merged(adapter, self._residual(collected.products.subtract(adapter), server, collected.factors.count))

    def _residual(self, rest: MeanUpdate, server: Mapping[str, LowRank], count: int) -> dict[str, LowRank] | None:
        """E, or its best approximation; None for a single client, whose update is the adapter."""
        most = {name: (count - 1) * part.rank for name, part in server.items()}
        if self.residual_rank:
            most = {name: min(rank, self.residual_rank) for name, rank in most.items()}
        return rest.factors(most) if any(most.values()) else None
