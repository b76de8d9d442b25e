"""One client's turn: the method's work, its requests answered by a trainer. The same on one machine and on many."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Fit, Round
from fedlora.method import AnyMethod
from fedlora.train.evaluate import Score


@runtime_checkable
class Trainer(Protocol):
    """Who has the model and the examples."""

    def fit(self, request: Fit, who: ClientInfo, rnd: Round, step: int) -> tuple[Adapter, Mapping[str, float]]:
        """The trained adapter, and notes such as its loss. `step` counts the client's requests in this round."""

    def fold(self, change: Mapping[str, LowRank]) -> None:
        """Changes the frozen base for good."""

    def score(self, adapter: Adapter, who: ClientInfo) -> Score | None:
        """The adapter on the client's held-out examples; None if it has none."""


@dataclass(frozen=True)
class Turn:
    """What a client has after its work: its next state, its upload, and the notes of its last training."""

    mine: Any
    upload: Tensors
    notes: Mapping[str, float]


def turn(method: AnyMethod, trainer: Trainer, who: ClientInfo, mine: Any, got: Tensors, rnd: Round) -> Turn:
    """Runs the method's work to its end."""
    job = method.work(mine, got, who, rnd)
    notes: Mapping[str, float] = {}
    step = 0
    try:
        request = next(job)
        while True:
            trained, notes = trainer.fit(request, who, rnd, step)
            step += 1
            request = job.send(trained)
    except StopIteration as done:
        mine, upload = done.value
        return Turn(mine, upload, notes)
