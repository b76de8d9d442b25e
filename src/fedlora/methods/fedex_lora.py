"""FedEx-LoRA: averages the factors, and merges their residual to the mean of the products into the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Round, RunningMean
from fedlora.method import Local, fit
from fedlora.methods.ideal import MeanUpdate
from fedlora.randomness import derive
from fedlora.ranges import NonNegativeInt, PositiveInt, checked


@dataclass(frozen=True)
@checked
class FedExLoRA:
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

    def init_server(self, spec: AdapterSpec, seed: int) -> dict[str, LowRank]:
        """Factors with zero update."""
        return lora_init(spec, self.rank, seed)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> None:
        """Stateless."""

    def send(self, server: Mapping[str, LowRank], client: ClientInfo, rnd: Round) -> Tensors:
        """The adapter; the round loop sends the base update."""
        return pack(server)

    def view(self, state: None, download: Tensors, client: ClientInfo) -> Adapter:
        """Downloaded adapter."""
        return unpack(download, LowRank)

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Tensors]]:
        """Trains both factors, and uploads them."""
        return state, pack((yield from fit(self.view(state, download, client))))

    def merge(self, server: Mapping[str, LowRank], replies: Replies, rnd: Round) -> Merged[dict[str, LowRank]]:
        """The adapter, and its residual to the mean of the products as a base update."""
        means, ideal, count = RunningMean(), MeanUpdate(), 0
        for reply in replies:
            means.add(reply.weight, reply.upload, reply.client.id)
            ideal = ideal.add(reply.weight, unpack(reply.upload, LowRank))
            count += 1
        if self.adapter == "mean":
            adapter = unpack(means.mean(), LowRank)
        else:
            adapter = ideal.best_fit(server, seed=derive(rnd.seed, "best_fit", rnd.index))
        base_update = self._residual(ideal.subtract(adapter), server, count)
        return Merged(adapter, base_update, {"aggregation_error": ideal.error(adapter, base_update or {})})

    def _residual(self, rest: MeanUpdate, server: Mapping[str, LowRank], count: int) -> dict[str, LowRank] | None:
        """E, or its best approximation; None for a single client, whose update is the adapter."""
        most = {name: (count - 1) * part.rank for name, part in server.items()}
        if self.residual_rank:
            most = {name: min(rank, self.residual_rank) for name, rank in most.items()}
        return rest.factors(most) if any(most.values()) else None
