"""Summaries of many clients' scores."""

import math
import statistics

import pytest
import torch

from fedlora.messages import Statistics
from fedlora.rounds.score_summary import Summary, summary

CLIENTS = [f"{i:02}" for i in range(20)]
EXAMPLES = {client: 1 + i % 4 for i, client in enumerate(CLIENTS)}
VALUES = {
    "accuracy": {client: i / 40 for i, client in enumerate(CLIENTS)},
    "loss": {client: 3.0 - i / 10 for i, client in enumerate(CLIENTS)},
}


def metrics(found):
    return {name: float(x) / found.examples for name, x in found.sums.items()}


def summed(clients=CLIENTS, metrics=metrics):
    scores = (
        (one, Statistics(EXAMPLES[one], {n: torch.tensor(EXAMPLES[one] * of[one]).double() for n, of in VALUES.items()}))
        for one in clients
    )
    return summary(scores, metrics, {"loss"})


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_the_mean_is_over_examples(name):
    every = [VALUES[name][client] for client in CLIENTS for _ in range(EXAMPLES[client])]
    assert summed()[name].mean == pytest.approx(statistics.fmean(every))
    assert summed()[name].mean != pytest.approx(statistics.fmean(VALUES[name].values()))


def test_the_mean_of_a_metric_that_is_no_mean_is_the_metric_of_all_examples_together():
    def root(found):
        return {"root": math.sqrt(float(found.sums["loss"]))}

    total = sum(VALUES["loss"][client] * EXAMPLES[client] for client in CLIENTS)
    assert summed(metrics=root)["root"].mean == pytest.approx(math.sqrt(total))


def test_the_bottom_decile_is_of_clients_and_has_the_lowest_accuracies_and_the_highest_losses():
    assert summed()["accuracy"].worst_decile == pytest.approx((0 / 40 + 1 / 40) / 2)
    assert summed()["loss"].worst_decile == pytest.approx((3.0 + 2.9) / 2)


def test_of_fewer_than_ten_clients_the_bottom_decile_is_one_client():
    few = summed(CLIENTS[3:6])
    assert few["accuracy"].worst_decile == pytest.approx(3 / 40)
    assert few["loss"].worst_decile == pytest.approx(3.0 - 0.3)


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_the_spread_is_the_standard_deviation_between_clients(name):
    assert summed()[name].spread == pytest.approx(statistics.pstdev(VALUES[name].values()))


def test_each_client_has_its_own_value():
    assert summed()["accuracy"].each == pytest.approx(VALUES["accuracy"])


def test_one_client_has_no_spread_and_is_its_own_bottom_decile():
    own = Statistics(8, {"loss": torch.tensor(4.0).double()})
    found = summary([("a", own)], metrics, {"loss"})["loss"]
    assert found == Summary(mean=0.5, worst_decile=0.5, spread=0.0, each={"a": 0.5})


def test_of_no_clients_there_is_nothing():
    assert summary([], metrics, ()) == {}
