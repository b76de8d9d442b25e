"""Bytes and losses in the rows of the round log, against what passed between the server and its clients."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fedlora.adapter import Tensors
from fedlora.config.sections import Evaluate
from fedlora.messages import ClientInfo, Reply, Round, Statistics
from fedlora.methods.flora import FLoRA
from fedlora.rounds.codec import encode
from fedlora.rounds.loop import run_rounds
from fedlora.rounds.plan import RunState
from fedlora.rounds.row import RoundRow
from fedlora.rounds.simulate import SimulationBackend

from toy import MemoryStates, Quiet, ToyTrainer, toy_clients, toy_plan, toy_simulation

Sent = Mapping[ClientInfo, Tensors]


@dataclass
class Metered:
    """A backend that encodes everything that passes; counts bytes by round and kind, and keeps the replies."""

    inner: SimulationBackend
    passed: Counter[tuple[int, str]] = field(default_factory=Counter)
    replies: list[Reply] = field(default_factory=list)

    def clients(self) -> Sequence[ClientInfo]:
        return self.inner.clients()

    def held(self) -> Mapping[str, Sequence[int]]:
        return self.inner.held()

    def merge_into_base(self, change: Any) -> None:
        self.inner.merge_into_base(change)

    def train_clients(self, rnd: Round, sent: Sent, pending: Sent) -> Iterator[Reply]:
        self._count(rnd.index, "download", sent.values())
        self._count(rnd.index, "base update", pending.values())
        for reply in self.inner.train_clients(rnd, sent, pending):
            assert isinstance(reply, Reply)
            self._count(rnd.index, "upload", [reply.upload.flat()])
            self.replies.append(reply)
            yield reply

    def evaluate(self, rnd: Round, sent: Sent, pending: Sent) -> Iterator[tuple[ClientInfo, Statistics | None]]:
        """After a round its successor's adapters are evaluated."""
        self._count(rnd.index - 1, "evaluation", sent.values())
        self._count(rnd.index - 1, "base update", pending.values())
        return self.inner.evaluate(rnd, sent, pending)

    def _count(self, index: int, kind: str, messages: Iterable[Tensors]) -> None:
        self.passed[index, kind] += sum(len(encode(tensors)) for tensors in messages)


def rows(evaluate: Evaluate) -> tuple[list[RoundRow], Metered]:
    """Three rounds of a method that changes the base in each."""
    method, trainer = FLoRA(rank=3), ToyTrainer()
    backend = Metered(toy_simulation(method, trainer, toy_clients()))
    plan = replace(toy_plan(method, trainer), evaluate=evaluate)
    start = RunState(method.init_server(trainer.spec, 0))
    return [row for _, row in run_rounds(plan, backend, MemoryStates(), start, 0, Quiet())], backend


@pytest.mark.parametrize("clients", ["none", "all"])
def test_a_row_has_the_bytes_that_passed_in_its_round_and_base_updates_are_downloads(clients):
    found, backend = rows(Evaluate(clients=clients))
    passed = backend.passed
    for index, row in enumerate(found):
        assert row.bytes_up == passed[index, "upload"] > 0
        assert row.bytes_down == passed[index, "download"] + passed[index, "base update"] > 0
        assert (row.bytes_eval or 0) == passed[index, "evaluation"]
    with_base_updates = {index for (index, kind), size in passed.items() if kind == "base update" and size}
    assert with_base_updates == ({1, 2} if clients == "none" else {0, 1, 2})


def test_the_loss_of_a_round_is_the_mean_over_its_training_examples():
    found, backend = rows(Evaluate(clients="none"))
    for index, row in enumerate(found):
        replies = [reply for reply in backend.replies if reply.round.index == index]
        losses = [reply.loss for reply in replies for _ in range(reply.client.examples)]
        assert row.train_loss == pytest.approx(sum(losses) / len(losses))
        assert row.train_loss != pytest.approx(sum(reply.loss for reply in replies) / len(replies))
