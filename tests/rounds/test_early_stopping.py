"""The best round of a run, and the end of a run that no longer improves."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from fedlora.config.sections import Evaluate
from fedlora.methods.averaging import FactorAveraging
from fedlora.rounds.early_stopping import best_round, stops, until_best
from fedlora.rounds.loop import run_rounds
from fedlora.rounds.plan import RunState
from fedlora.rounds.row import RoundRow
from fedlora.rounds.score_summary import Summary

from rows import round_row
from toy import MemoryStates, Quiet, ToyTrainer, toy_clients, toy_plan, toy_simulation

NAN = math.nan


def log(values: Sequence[float | None], name: str = "accuracy") -> list[RoundRow]:
    """Rows whose clients have these scores; None: not evaluated."""
    return [
        replace(round_row(i), clients=None if value is None else {name: Summary(value, value / 2, 0.0, {})})
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.5], 0),
        ([0.1, 0.3, 0.2], 1),
        ([0.1, 0.3, 0.3], 1),
        ([None, None, 0.3], 2),
        ([NAN, 0.3, NAN], 1),
        ([NAN, NAN], None),
        ([None], None),
        ([], None),
    ],
)
def test_the_best_round_is_the_first_with_the_best_value(values, best):
    for statistic in ("mean", "worst_decile"):
        assert best_round(log(values), f"clients.accuracy.{statistic}", ["loss"]) == best
    losses = log([None if value is None else -value for value in values], "loss")
    assert best_round(losses, "clients.loss.mean", ["loss"]) == best


@pytest.mark.parametrize(
    ("values", "patience", "stopped"),
    [
        ([0.1, 0.2, 0.2], 1, True),
        ([0.1, 0.2, 0.2], 2, False),
        ([0.3, None, 0.2, None, 0.1], 2, True),
        ([0.3, None, 0.2, None], 2, False),
        ([0.3, NAN, 0.1], 2, True),
        ([NAN, NAN], 2, True),
        ([0.1, 0.0, 0.2], 2, False),
        ([None, None], 1, False),
        ([], 1, False),
    ],
)
def test_a_run_stops_after_that_many_evaluations_without_improvement(values, patience, stopped):
    rows = log(values)
    rows = [*rows[:-1], *(replace(row, best_round=best_round(rows, "clients.accuracy.mean", [])) for row in rows[-1:])]
    assert stops(rows, patience) == stopped
    assert not stops(rows, None)


def test_a_log_is_cut_after_its_best_round():
    rows = log([0.1, 0.3, 0.2])
    assert until_best(rows) == rows and until_best([]) == []
    assert until_best([*rows[:2], replace(rows[2], best_round=1)]) == rows[:2]


@pytest.mark.parametrize("stop_after", [None, 9])
def test_a_run_that_may_stop_trains_a_round_only_after_the_scores_of_the_last(stop_after):
    """The results are the same."""
    method, trainer, calls = FactorAveraging(rank=3), ToyTrainer(), list[str]()
    simulation = toy_simulation(method, trainer, toy_clients(3))

    class Recorded:
        def __getattr__(self, name):
            return getattr(simulation, name)

        def train_clients(self, rnd, *rest):
            calls.append(f"train {rnd.index + 1}")
            return simulation.train_clients(rnd, *rest)

        def evaluate(self, rnd, *rest):
            yield from simulation.evaluate(rnd, *rest)
            calls.append(f"scores {rnd.index}")

    plan = replace(toy_plan(method, trainer, rounds=2), evaluate=Evaluate(stop_after=stop_after))
    start = RunState(method.init_server(trainer.spec, 0))
    for _ in run_rounds(plan, Recorded(), MemoryStates(), start, 0, Quiet()):
        pass
    in_order = ["train 1", "scores 1", "train 2", "scores 2"]
    assert calls == (in_order if stop_after else ["train 1", "train 2", "scores 1", "scores 2"])
