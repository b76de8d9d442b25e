"""All clients on one machine, around one resident model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round
from fedlora.method import AnyMethod
from fedlora.rounds.client import Trainer, turn
from fedlora.rounds.codec import outline
from fedlora.train.evaluate import Score


@runtime_checkable
class ClientStates(Protocol):
    """Where the clients' states are between rounds."""

    def client_state(self, who: ClientInfo, before: int) -> Any | None:
        """The state after the last round of index below `before` that left one."""

    def save_client(self, who: ClientInfo, index: int, state: Any) -> None:
        """Keeps the state after the round of this index."""


@dataclass(frozen=True)
class Simulation:
    """The exchange within one process. A client's state is read when it is needed, and written only if it changed."""

    method: AnyMethod
    spec: AdapterSpec
    members: Sequence[ClientInfo]
    states: ClientStates
    trainer: Trainer
    seed: int

    def clients(self) -> Sequence[ClientInfo]:
        """All of them."""
        return self.members

    def held(self) -> Mapping[str, Sequence[int]]:
        """Nothing: what they would hold on machines of their own is only counted."""
        return {}

    def fold(self, change: Mapping[str, LowRank]) -> None:
        """Changes the one base that all share."""
        self.trainer.fold(change)

    def turn(self, rnd: Round, sent: Mapping[ClientInfo, Tensors], missed: Mapping[ClientInfo, Tensors]) -> Iterator[Reply]:
        """The replies, as each client finishes, in the order of `sent`. The base has all folds already."""
        for who, got in sent.items():
            mine = self._state(who, rnd.index)
            done = turn(self.method, self.trainer, who, mine, got, rnd)
            if not _same(mine, done.mine):
                self.states.save_client(who, rnd.index, done.mine)
            yield Reply(who, rnd, done.upload, float(who.examples), done.notes)

    def judge(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], missed: Mapping[ClientInfo, Tensors]
    ) -> Iterator[tuple[ClientInfo, Score | None]]:
        """Each client's score before round `rnd`, on its held-out examples; None where it has none."""
        for who, got in sent.items():
            yield who, self.trainer.score(self.view(who, got, rnd), who)

    def view(self, who: ClientInfo, got: Tensors, rnd: Round) -> Adapter:
        """The adapter that the client would use at the start of round `rnd`."""
        return self.method.view(self._state(who, rnd.index), got, who)

    def _state(self, who: ClientInfo, before: int) -> Any:
        saved = self.states.client_state(who, before)
        return self.method.init_client(self.spec, who, self.seed) if saved is None else saved


def _same(mine: Any, after: Any) -> bool:
    """Whether a state is the one before, with the very same tensors, so that it need not be written."""
    (plan, before), (planned, now) = outline(mine), outline(after)
    return plan == planned and all(x is y for x, y in zip(before, now, strict=True))
