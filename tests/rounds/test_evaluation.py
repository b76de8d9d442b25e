"""After which rounds, and of which clients, there are scores."""

from dataclasses import dataclass, field, replace

import pytest

from fedlora.config.sections import Evaluate
from fedlora.methods.averaging import FactorAveraging
from fedlora.rounds.loop import run_rounds
from fedlora.rounds.plan import RunState
from fedlora.rounds.simulate import SimulationBackend

from toy import MemoryStates, Quiet, ToyTrainer, toy_clients, toy_plan, toy_simulation


def rows(evaluate, rounds=5, fraction=1.0):
    method, trainer = FactorAveraging(rank=3), ToyTrainer()
    plan = replace(toy_plan(method, trainer, rounds=rounds, fraction=fraction), evaluate=evaluate)
    simulation = toy_simulation(method, trainer, toy_clients(4))
    start = RunState(method.init_server(trainer.spec, 0))
    return [row for _, row in run_rounds(plan, simulation, MemoryStates(), start, 0, Quiet())]


@pytest.mark.parametrize(("every", "evaluated"), [(1, {1, 2, 3, 4, 5}), (2, {2, 4, 5}), (3, {3, 5}), (9, {5})])
def test_every_nth_round_and_the_last_one_are_evaluated(every, evaluated):
    found = rows(Evaluate(every=every))
    assert {row.round for row in found if row.global_ is not None} == evaluated
    assert {row.round for row in found if row.clients is not None} == evaluated


def test_all_clients_those_of_the_round_or_none_are_evaluated():
    everybody, chosen, none = (rows(Evaluate(clients=which), 2, 0.5) for which in ("all", "chosen", "none"))
    for row in everybody:
        assert all(len(metric.each) == 4 for metric in row.clients.values())
    for row in chosen:
        assert all(sorted(metric.each) == sorted(row.accepted) for metric in row.clients.values())
        assert len(row.accepted) == 2
    assert all(row.clients is None and row.global_ is not None for row in none)


def test_a_row_has_the_number_of_held_out_examples_of_each_evaluated_client():
    everybody, chosen, none = (rows(Evaluate(clients=which), 2, 0.5) for which in ("all", "chosen", "none"))
    sizes = {client.id: client.examples for client in toy_clients(4)}  # the toy evaluates on as many as it trains on
    assert all(row.held_out == sizes for row in everybody)
    assert all(row.held_out == {client: sizes[client] for client in row.accepted} for row in chosen)
    assert all(row.held_out is None for row in none)


@dataclass(frozen=True)
class Noting(SimulationBackend):
    """Notes when requests are sent and when scores are collected, each with the number of rounds before it."""

    events: list[str] = field(default_factory=list)

    def train_clients(self, rnd, sent, pending):
        self.events.append(f"send training {rnd.index}")
        return super().train_clients(rnd, sent, pending)

    def evaluate(self, rnd, sent, pending):
        self.events.append(f"send evaluation {rnd.index}")
        return self._noted(rnd, super().evaluate(rnd, sent, pending))

    def _noted(self, rnd, scores):
        self.events.append(f"collect scores {rnd.index}")
        yield from scores


def test_the_next_rounds_training_is_sent_with_the_evaluation_before_its_scores_are_collected():
    method, trainer = FactorAveraging(rank=3), ToyTrainer()
    backend = Noting(method, trainer.spec, toy_clients(4), MemoryStates(), trainer, seed=0)
    rounds = run_rounds(
        toy_plan(method, trainer, rounds=2),
        backend,
        MemoryStates(),
        RunState(method.init_server(trainer.spec, 0)),
        0,
        Quiet(),
        True,
    )
    for _, row in rounds:
        backend.events.append(f"row {row.round}")
    assert backend.events == [
        "send evaluation 0",
        "send training 0",
        "collect scores 0",
        "row 0",
        "send evaluation 1",
        "send training 1",
        "collect scores 1",
        "row 1",
        "send evaluation 2",
        "collect scores 2",
        "row 2",
    ]
