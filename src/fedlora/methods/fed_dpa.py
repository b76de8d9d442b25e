"""FedDPA: in addition to the averaged adapter, each client trains a personal one."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, pack, unpack
from fedlora.linalg.combine import stack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Round
from fedlora.method import Local, fit
from fedlora.methods.averaging import FactorAveraging
from fedlora.randomness import derive
from fedlora.ranges import PositiveInt, checked


@dataclass(frozen=True)
@checked
class FedDPA:
    """A shared adapter as in FedIT, and on each client a personal adapter of rank `personal_rank`, which is never sent.

    In a round a client first trains the shared adapter alone, bitwise as in FedIT. Then it trains its personal adapter,
    with the shared adapter that it has just trained as frozen extra factors. It is evaluated with the sum of its
    personal adapter and the mean shared adapter; a client that has never participated, with the shared adapter alone. A
    round costs two trainings. A head that is not frozen is trained in both.

    This is the paper's FedDPA-T, where both adapters are trained in each round (in FedDPA-F the personal one is trained
    after the last round). The paper weighs the two adapters for each example, by its similarity to the client's own
    examples; here both have full weight, as an adapter does not see examples. The paper's text was not available: the
    order within a round and the initial personal adapter are this package's choice.

    Source: Yang et al. 2024, arXiv:2403.19211.
    """

    rank: PositiveInt = 8
    personal_rank: PositiveInt = 8
    """The rank of the personal factors."""

    def init_server(self, spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
        """A shared adapter with zero update."""
        return self._shared().init_server(spec, seed)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> dict[str, LowRank]:
        """A personal adapter with zero update."""
        return lora_init(spec, self.personal_rank, derive(seed, "personal"))

    def send(self, server: Tensors, client: ClientInfo, rnd: Round) -> Tensors:
        """The shared adapter."""
        return server

    def view(self, state: Mapping[str, LowRank], download: Tensors, client: ClientInfo) -> Adapter:
        """The sum of both adapters, as concatenated factors."""
        return {name: stack([(1.0, part), (1.0, state[name])]) for name, part in unpack(download, LowRank).items()}

    def work(
        self, state: Mapping[str, LowRank], download: Tensors, client: ClientInfo, rnd: Round
    ) -> Local[tuple[Mapping[str, LowRank], Tensors]]:
        """Trains the shared adapter, then the personal adapter with the shared one frozen; uploads the shared one."""
        shared = _pairs((yield from fit(unpack(download, LowRank))))
        return _pairs((yield from fit(state, frozen_extra=shared))), pack(shared)

    def merge(self, server: Tensors, replies: Replies, rnd: Round) -> Merged[dict[str, Tensor]]:
        """The weighted mean of the shared adapters."""
        return self._shared().merge(server, replies, rnd)

    def _shared(self) -> FactorAveraging:
        return FactorAveraging(self.rank)


def _pairs(adapter: Adapter) -> dict[str, LowRank]:
    return {name: part for name, part in adapter.items() if isinstance(part, LowRank)}
