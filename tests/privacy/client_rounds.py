"""Rounds of the toy problem with client-level privacy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import Tensors
from fedlora.config.sections import Evaluate
from fedlora.messages import ClientInfo, Mean, Merged, Reply, Round, Upload
from fedlora.methods.wrap.wrapper import Wrapper
from fedlora.rounds.client_privacy import ClientPrivacy
from fedlora.rounds.loop import run_rounds
from fedlora.rounds.plan import Plan, RunState
from fedlora.rounds.row import RoundRow
from fedlora.rounds.simulate import SimulationBackend
from fedlora.rounds.validator import Failed

from toy import MemoryStates, Quiet, ToyTrainer, toy_plan, toy_simulation

Sent = Mapping[ClientInfo, Tensors]


@dataclass(frozen=True)
class Seen(Wrapper):
    """A method that keeps what it merges."""

    means: list[dict[str, Tensor]] = field(default_factory=list)

    def merge(self, server: Any, collected: Mean, rnd: Round) -> Merged[Any]:
        self.means.append(collected.tensors())
        return self.inner.merge(server, collected, rnd)


@dataclass
class Spoiled:
    """A backend in which the uploads of some clients are multiplied by a factor, and others fail."""

    inner: SimulationBackend
    factors: Mapping[str, float] = field(default_factory=dict)
    failed: Sequence[str] = ()
    trained: list[int] = field(default_factory=list)

    def clients(self) -> Sequence[ClientInfo]:
        return self.inner.clients()

    def held(self) -> Mapping[str, Sequence[int]]:
        return {}

    def merge_into_base(self, change: Any) -> None:
        self.inner.merge_into_base(change)

    def evaluate(self, rnd: Round, sent: Sent, pending: Sent) -> Any:
        raise AssertionError("no client is evaluated")

    def train_clients(self, rnd: Round, sent: Sent, pending: Sent) -> Iterator[Reply | Failed]:
        self.trained.append(rnd.index)
        for reply in self.inner.train_clients(rnd, sent, pending):
            factor = self.factors.get(reply.client.id, 1.0)
            if reply.client.id in self.failed or isinstance(reply, Failed):
                yield Failed(reply.client, "no reply")
            else:
                values = {name: factor * x for name, x in reply.upload.values.items()}
                yield replace(reply, upload=Upload(values, reply.upload.choices))


def privacy(clip: float = 1.0, noise: float = 0.0, rate: float = 1.0, expected: float = 4.0, **more: Any) -> ClientPrivacy:
    """Client-level privacy whose epsilon is the number of rounds."""
    return ClientPrivacy(clip, noise, 1e-5, rate, expected, float, **more)


def private_plan(method: Any, trainer: ToyTrainer, level: ClientPrivacy, rounds: int = 3) -> Plan:
    """The toy's plan, with client-level privacy."""
    plan = toy_plan(method, trainer, rounds=rounds)
    return replace(plan, evaluate=Evaluate(clients="none"), client_level=level, hides_training=True)


def private_rounds(
    method: Any, clients: Sequence[ClientInfo], level: ClientPrivacy, rounds: int = 3, **spoiled: Any
) -> tuple[RunState, list[RoundRow]]:
    """The state after some rounds, and their rows."""
    trainer = ToyTrainer()
    backend, plan = (
        Spoiled(toy_simulation(method, trainer, clients), **spoiled),
        private_plan(method, trainer, level, rounds),
    )
    start = RunState(method.init_server(trainer.spec, 0))
    found = list(run_rounds(plan, backend, MemoryStates(), start, 0, Quiet()))
    return found[-1][0], [row for _, row in found]


def norm(tensors: Mapping[str, Tensor]) -> float:
    """The L2 norm over all tensors together."""
    return float(torch.cat([x.double().flatten() for x in tensors.values()]).norm())


def minus(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their difference."""
    return {name: x.double() - other[name].double() for name, x in one.items()}
