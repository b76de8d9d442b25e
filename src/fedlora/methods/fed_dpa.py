"""FedDPA: in addition to the averaged adapter, each client trains a personal one."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, low_rank, pack, unpack
from fedlora.linalg.combine import stack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.randomness import derive
from fedlora.ranges import PositiveInt, checked


@dataclass(frozen=True)
@checked
class FedDPA(Method[Tensors, Mapping[str, LowRank], Mean]):
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

    def init_server(self, spec: AdapterSpec, seed: int) -> Tensors:
        """A shared adapter with zero update."""
        return pack(lora_init(spec, self.rank, seed))

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Mapping[str, LowRank]:
        """A personal adapter with zero update."""
        return lora_init(spec, self.personal_rank, derive(seed, "personal"))

    def view(self, state: Mapping[str, LowRank], download: Tensors, client: ClientInfo) -> Adapter:
        """The sum of both adapters, as concatenated factors."""
        return {name: stack([(1.0, part), (1.0, state[name])]) for name, part in unpack(download, LowRank).items()}

    def work(
        self, state: Mapping[str, LowRank], download: Tensors, client: ClientInfo, rnd: Round
    ) -> Local[tuple[Mapping[str, LowRank], Upload]]:
        """Trains the shared adapter, then the personal adapter with the shared one frozen; uploads the shared one."""
        shared = low_rank((yield from fit(unpack(download, LowRank))))
        return low_rank((yield from fit(state, frozen_extra=shared, role="personal"))), Upload(pack(shared))

    def merge(self, server: Tensors, collected: Mean, rnd: Round) -> Merged[Tensors]:
        """The weighted mean of the shared adapters."""
        return Merged(collected.tensors())

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The change of the shared product."""
        return changes(unpack(upload.values, LowRank), unpack(known.download, LowRank))
