"""FLoRA: the clients' stacked factors are merged into the base, and all clients restart from fresh factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, pack, unpack
from fedlora.linalg.combine import fresh_rows
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Round
from fedlora.method import Local, fit
from fedlora.methods.ideal import MeanUpdate
from fedlora.ranges import PositiveInt, checked


@dataclass(frozen=True)
@checked
class FLoRA:
    """The base update is [w_1 b_1, ..., w_K b_K] [a_1; ...; a_K] = sum_k w_k b_k a_k: exact, for any ranks of the clients.

    Each round starts from b = 0 and a random a that the client generates, so that only the base update is downloaded.
    With `draw` "client", as in the released code, each client has its own a; with "shared" all have the same.

    The rank of the base update is the sum of the clients' ranks, unless the dense matrix is smaller. The released code
    applies the weights to a, this one to b; the product is the same.

    Source: Wang et al. 2024, arXiv:2409.05976, section 3.
    """

    rank: PositiveInt = 8
    draw: Literal["client", "shared"] = "client"
    """The random initial a in each round: one per client (client), or the same for all (shared)."""

    def init_server(self, spec: AdapterSpec, seed: int) -> dict[str, LowRank]:
        """Stateless: all updates are in the base."""
        return {}

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> dict[str, LowRank]:
        """Factors with zero update, used only for their shapes."""
        return lora_init(spec, client.rank, seed)

    def send(self, server: Mapping[str, LowRank], client: ClientInfo, rnd: Round) -> Tensors:
        """Empty: only the base update is sent."""
        return {}

    def view(self, state: Mapping[str, LowRank], download: Tensors, client: ClientInfo) -> Adapter:
        """Factors with zero update."""
        return state

    def work(
        self, state: Mapping[str, LowRank], download: Tensors, client: ClientInfo, rnd: Round
    ) -> Local[tuple[Mapping[str, LowRank], Tensors]]:
        """Trains newly initialized factors, and uploads them."""
        start = {name: LowRank(b=part.b, a=self._fresh(name, part, client, rnd).to(part.a)) for name, part in state.items()}
        return state, pack((yield from fit(start)))

    def merge(self, server: Mapping[str, LowRank], replies: Replies, rnd: Round) -> Merged[dict[str, LowRank]]:
        """The stacked factors as a base update."""
        ideal = MeanUpdate()
        for reply in replies:
            ideal = ideal.add(reply.weight, unpack(reply.upload, LowRank))
        base_update = ideal.factors()
        return Merged({}, base_update, {"aggregation_error": ideal.error(base_update)})

    def _fresh(self, name: str, part: LowRank, client: ClientInfo, rnd: Round) -> Tensor:
        """This round's initial factors; with a shared a [rank, in], clients of smaller rank have its first rows."""
        rng = rnd.rng(f"flora {name}", client.id if self.draw == "client" else "")
        return fresh_rows((max(self.rank, part.rank), part.a.shape[-1]), rng)[: part.rank]
