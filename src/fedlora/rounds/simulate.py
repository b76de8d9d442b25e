"""Simulation of all clients on one machine, sharing one resident model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Statistics
from fedlora.method import AnyMethod
from fedlora.rounds.client import ClientStart, Trainer, train_clients
from fedlora.rounds.codec import outline
from fedlora.rounds.validator import Failed

_GROUPS = 4  # number of groups in memory at once


@runtime_checkable
class ClientStates(Protocol):
    """Storage of the clients' states between rounds."""

    def client_state(self, client: ClientInfo, before: int) -> Any | None:
        """State saved in the last round with index below `before`, None if no round saved one."""

    def save_client(self, client: ClientInfo, index: int, state: Any) -> None:
        """Saves the state after the round with this index."""


@dataclass(frozen=True)
class SimulationBackend:
    """Backend within one process. A client's state is read when it is needed, and written only if it has changed."""

    method: AnyMethod
    spec: AdapterSpec
    registered: Sequence[ClientInfo]
    states: ClientStates
    trainer: Trainer
    seed: int

    def clients(self) -> Sequence[ClientInfo]:
        """All clients."""
        return self.registered

    def held(self) -> Mapping[str, Sequence[int]]:
        """Empty: in a simulation the log alone determines which base updates clients have."""
        return {}

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Merges a base update into the base that all clients share."""
        self.trainer.merge_into_base(change)

    def train_clients(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[Reply | Failed]:
        """Yields replies in the order of `sent` as groups of clients finish. `pending` is unused: the base is shared."""
        for window in self._windows(sent):
            starts = [ClientStart(client, self._state(client, rnd.index), sent[client]) for client in window]
            for before, done in zip(starts, train_clients(self.method, self.trainer, starts, rnd), strict=True):
                if isinstance(done, Failed):
                    yield done
                    continue
                if not _same(before.state, done.state):
                    self.states.save_client(before.client, rnd.index, done.state)
                yield Reply(before.client, rnd, done.upload, float(before.client.examples), done.loss, done.steps)

    def evaluate(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[tuple[ClientInfo, Statistics | None]]:
        """Each client's score before round `rnd` on its held-out examples; None for a client without any."""
        for window in self._windows(sent):
            scores = self.trainer.scores([(client, self.view(client, sent[client], rnd)) for client in window])
            yield from zip(window, scores, strict=True)

    def _windows(self, clients: Iterable[ClientInfo]) -> Iterator[list[ClientInfo]]:
        """Splits clients into windows of a few groups: enough to group similar work, small enough to fit in memory."""
        left, clients_per_step = iter(clients), self.trainer.clients_per_step
        while window := list(islice(left, _GROUPS * clients_per_step if clients_per_step > 1 else 1)):
            yield window

    def view(self, client: ClientInfo, download: Tensors, rnd: Round) -> Adapter:
        """Adapter that the client would use at the start of round `rnd`."""
        return self.method.view(self._state(client, rnd.index), download, client)

    def _state(self, client: ClientInfo, before: int) -> Any:
        saved = self.states.client_state(client, before)
        return self.method.init_client(self.spec, client, self.seed) if saved is None else saved


def _same(state: Any, after: Any) -> bool:
    """Whether a state is unchanged, with identical tensor objects, and need not be written."""
    (plan, before), (planned, now) = outline(state), outline(after)
    return plan == planned and all(x is y for x, y in zip(before, now, strict=True))
