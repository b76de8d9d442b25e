"""FLoRA: the clients' stacked factors are merged into the base, and all clients restart from fresh factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, pack, unpack
from fedlora.linalg.combine import fresh_rows
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.mean_update import MeanUpdate
from fedlora.messages import ClientInfo, Merged, Reply, Round, Upload
from fedlora.method import ClientRound, Local, Method, fit
from fedlora.ranges import PositiveInt, checked


@dataclass(frozen=True)
@checked
class FLoRA(Method[Mapping[str, LowRank], Mapping[str, LowRank], MeanUpdate]):
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

    def init_server(self, spec: AdapterSpec, seed: int) -> Mapping[str, LowRank]:
        """Stateless: all updates are in the base."""
        return {}

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Mapping[str, LowRank]:
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
    ) -> Local[tuple[Mapping[str, LowRank], Upload]]:
        """Trains newly initialized factors, and uploads them."""
        start = {name: LowRank(b=part.b, a=self._fresh(name, part, client, rnd).to(part.a)) for name, part in state.items()}
        return state, Upload(pack((yield from fit(start))))

    def collect(self, server: Mapping[str, LowRank], collected: MeanUpdate | None, reply: Reply) -> MeanUpdate:
        """The stacked factors."""
        return (collected or MeanUpdate()).add(reply.weight, unpack(reply.upload.values, LowRank))

    def merge(self, server: Mapping[str, LowRank], collected: MeanUpdate, rnd: Round) -> Merged[Mapping[str, LowRank]]:
        """The stacked factors as a base update."""
        return Merged({}, collected.factors())

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The uploaded product, which started at zero."""
        return unpack(upload.values, LowRank)

    def _fresh(self, name: str, part: LowRank, client: ClientInfo, rnd: Round) -> Tensor:
        """This round's initial factors; with a shared a [rank, in], clients of smaller rank have its first rows."""
        rng = rnd.rng(f"flora {name}", client.id if self.draw == "client" else "")
        return fresh_rows((max(self.rank, part.rank), part.a.shape[-1]), rng)[: part.rank]
