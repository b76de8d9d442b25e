"""All clients on one machine, around one resident model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Score
from fedlora.method import AnyMethod
from fedlora.rounds.client import ClientStart, Trainer, turns
from fedlora.rounds.codec import outline
from fedlora.rounds.validator import Failed

_GROUPS = 4  # that are in memory at once


@runtime_checkable
class ClientStates(Protocol):
    """Where the clients' states are between rounds."""

    def client_state(self, client: ClientInfo, before: int) -> Any | None:
        """The state after the last round of index below `before` that left one."""

    def save_client(self, client: ClientInfo, index: int, state: Any) -> None:
        """Keeps the state after the round of this index."""


@dataclass(frozen=True)
class SimulationBackend:
    """The backend within one process. A client's state is read when it is needed, and written only if it changed."""

    method: AnyMethod
    spec: AdapterSpec
    registered: Sequence[ClientInfo]
    states: ClientStates
    trainer: Trainer
    seed: int

    def clients(self) -> Sequence[ClientInfo]:
        """All of them."""
        return self.registered

    def held(self) -> Mapping[str, Sequence[int]]:
        """Nothing: what they would hold on machines of their own is only counted."""
        return {}

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Changes the one base that all share."""
        self.trainer.merge_into_base(change)

    def train_clients(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[Reply | Failed]:
        """The replies, in the order of `sent`, as each group of clients finishes. The base has all base updates already."""
        for some in self._windows(sent):
            begun = [ClientStart(client, self._state(client, rnd.index), sent[client]) for client in some]
            for before, done in zip(begun, turns(self.method, self.trainer, begun, rnd), strict=True):
                if isinstance(done, Failed):
                    yield done
                    continue
                if not _same(before.state, done.state):
                    self.states.save_client(before.client, rnd.index, done.state)
                yield Reply(before.client, rnd, done.upload, float(before.client.examples), done.notes)

    def evaluate(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[tuple[ClientInfo, Score | None]]:
        """Each client's score before round `rnd`, on its held-out examples; None where it has none."""
        for some in self._windows(sent):
            scores = self.trainer.scores([(client, self.view(client, sent[client], rnd)) for client in some])
            yield from zip(some, scores, strict=True)

    def _windows(self, clients: Iterable[ClientInfo]) -> Iterator[list[ClientInfo]]:
        """A few groups' clients at a time: enough to form groups of similar work, few enough to keep in memory."""
        left, clients_per_step = iter(clients), self.trainer.clients_per_step
        while some := list(islice(left, _GROUPS * clients_per_step if clients_per_step > 1 else 1)):
            yield some

    def view(self, client: ClientInfo, download: Tensors, rnd: Round) -> Adapter:
        """The adapter that the client would use at the start of round `rnd`."""
        return self.method.view(self._state(client, rnd.index), download, client)

    def _state(self, client: ClientInfo, before: int) -> Any:
        saved = self.states.client_state(client, before)
        return self.method.init_client(self.spec, client, self.seed) if saved is None else saved


def _same(state: Any, after: Any) -> bool:
    """Whether a state is the one before, with the very same tensors, so that it need not be written."""
    (plan, before), (planned, now) = outline(state), outline(after)
    return plan == planned and all(x is y for x, y in zip(before, now, strict=True))
