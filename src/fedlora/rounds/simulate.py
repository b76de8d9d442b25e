"""Simulation of all clients on one machine, sharing one resident model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Statistics
from fedlora.method import AnyMethod
from fedlora.rounds.budgets import Budgets
from fedlora.rounds.client import ClientStart, LocalResult, Trainer, train_clients
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
class Counted:
    """What is stored of a client with a privacy budget: its state, the number of its steps, the round's attempt."""

    state: Any
    steps: int
    attempt: int


@dataclass(frozen=True)
class SimulationBackend:
    """Backend within one process. A client's state is read when it is needed, and written only if it has changed.

    Clients in `budgets` are trained privately, and sit out when their budget is spent. With `hides_training`, replies have
    no losses and no numbers of steps.
    """

    method: AnyMethod
    spec: AdapterSpec
    registered: Sequence[ClientInfo]
    states: ClientStates
    trainer: Trainer
    seed: int
    budgets: Budgets = field(default_factory=Budgets)
    hides_training: bool = False

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
            starts = [self._start(client, sent[client], rnd) for client in window]
            for before, done in zip(
                starts, train_clients(self.method, self.trainer, starts, rnd, self.budgets), strict=True
            ):
                self._save(before, done, rnd)
                if isinstance(done, Failed):
                    yield done
                    continue
                reply = Reply(before.client, rnd, done.upload, float(before.client.examples))
                yield reply if self.hides_training else replace(reply, loss=done.loss, steps=done.steps)

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

    def private_steps(self, client: ClientInfo, rounds: int) -> int:
        """The number of steps of a client with a budget in all its trainings of the first `rounds` rounds."""
        saved = self.states.client_state(client, rounds) if client.id in self.budgets.most_steps else None
        return saved.steps if isinstance(saved, Counted) else 0

    def _start(self, client: ClientInfo, download: Tensors, rnd: Round) -> ClientStart:
        """A client's inputs; its steps in earlier attempts of the round count, but not its state after them."""
        steps = self.private_steps(client, rnd.index)
        if rnd.attempt and client.id in self.budgets.most_steps:
            now = self.states.client_state(client, rnd.index + 1)
            if isinstance(now, Counted) and now.attempt < rnd.attempt:  # others are of a run that was killed later
                steps = now.steps
        return ClientStart(client, self._state(client, rnd.index), download, steps)

    def _save(self, before: ClientStart, done: LocalResult | Failed, rnd: Round) -> None:
        """Saves a client's state, if it has changed, and the number of its steps, if it has a budget."""
        client, state = before.client, before.state if isinstance(done, Failed) else done.state
        if client.id in self.budgets.most_steps:
            self.states.save_client(client, rnd.index, Counted(state, done.private_steps, rnd.attempt))
        elif not _same(before.state, state):
            self.states.save_client(client, rnd.index, state)

    def _state(self, client: ClientInfo, before: int) -> Any:
        saved = self.states.client_state(client, before)
        if saved is None:
            return self.method.init_client(self.spec, client, self.seed)
        return saved.state if isinstance(saved, Counted) else saved


def _same(state: Any, after: Any) -> bool:
    """Whether a state is unchanged, with identical tensor objects, and need not be written."""
    (plan, before), (planned, now) = outline(state), outline(after)
    return plan == planned and all(x is y for x, y in zip(before, now, strict=True))
