"""Summaries of many clients' scores."""

import statistics

import pytest

from fedlora.messages import Score
from fedlora.rounds.score_summary import Summary, summary

SCORES = {f"{i:02}": Score(metrics={"accuracy": i / 40, "loss": 3.0 - i / 10}, examples=1 + i % 4) for i in range(20)}


def values(name):
    return {client: score.metrics[name] for client, score in SCORES.items()}


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_the_mean_is_over_examples(name):
    every = [score.metrics[name] for score in SCORES.values() for _ in range(score.examples)]
    assert summary(SCORES)[name].mean == pytest.approx(statistics.fmean(every))
    assert summary(SCORES)[name].mean != pytest.approx(statistics.fmean(values(name).values()))


def test_the_bottom_decile_is_of_clients_and_has_the_lowest_accuracies_and_the_highest_losses():
    found = summary(SCORES)
    assert found["accuracy"].worst_decile == pytest.approx((0 / 40 + 1 / 40) / 2)
    assert found["loss"].worst_decile == pytest.approx((3.0 + 2.9) / 2)


def test_of_fewer_than_ten_clients_the_bottom_decile_is_one_client():
    few = dict(list(SCORES.items())[3:6])
    assert summary(few)["accuracy"].worst_decile == 3 / 40
    assert summary(few)["loss"].worst_decile == pytest.approx(3.0 - 0.3)


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_the_spread_is_the_standard_deviation_between_clients(name):
    assert summary(SCORES)[name].spread == pytest.approx(statistics.pstdev(values(name).values()))


def test_each_client_has_its_own_value():
    assert summary(SCORES)["accuracy"].each == values("accuracy")


def test_one_client_has_no_spread_and_is_its_own_bottom_decile():
    found = summary({"a": Score(metrics={"loss": 0.5}, examples=7)})["loss"]
    assert found == Summary(mean=0.5, worst_decile=0.5, spread=0.0, each={"a": 0.5})


def test_of_no_clients_there_is_nothing():
    assert summary({}) == {}
