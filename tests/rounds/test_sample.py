from collections import Counter

import pytest

from fedlora.messages import ClientInfo, Round
from fedlora.rounds.sample import choose

TEN = [ClientInfo(f"{i:03}", rank=4, examples=i + 1) for i in range(10)]


def ids(chosen):
    return [client.id for client in chosen]


def test_the_same_round_chooses_the_same_clients():
    assert choose(TEN, 0.3, Round(2, seed=7)) == choose(TEN, 0.3, Round(2, seed=7))


def test_the_choice_does_not_depend_on_the_order_of_the_clients():
    mixed = [TEN[i] for i in (3, 9, 0, 5, 1, 8, 2, 7, 4, 6)]
    assert all(choose(mixed, 0.4, Round(i, seed=1)) == choose(TEN, 0.4, Round(i, seed=1)) for i in range(20))


@pytest.mark.parametrize(
    "rounds",
    [
        [Round(i, seed=0) for i in range(20)],
        [Round(0, seed=0, attempt=i) for i in range(20)],
        [Round(0, seed=i) for i in range(20)],
    ],
    ids=["index", "attempt", "seed"],
)
def test_round_attempt_and_seed_each_change_the_choice(rounds):
    choices = {tuple(ids(choose(TEN, 0.3, rnd))) for rnd in rounds}
    assert len(choices) > 12  # of 120 possible ones


def test_index_and_attempt_do_not_stand_in_for_each_other():
    choices = [tuple(ids(choose(TEN, 0.5, Round(i, seed=0, attempt=j)))) for i in range(4) for j in range(4)]
    assert len(set(choices)) > 12  # of 252 possible ones


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 10), (0.5, 5), (0.31, 3), (0.26, 3), (0.04, 1), (1e-9, 1)])
def test_the_fraction_is_rounded_and_at_least_one_client_is_chosen(fraction, count):
    chosen = ids(choose(TEN, fraction, Round(0, seed=0)))
    assert len(set(chosen)) == len(chosen) == count


def test_the_chosen_are_in_order_of_their_ids():
    chosen = ids(choose(TEN[::-1], 0.6, Round(5, seed=0)))
    assert chosen == sorted(chosen)


def test_every_client_is_chosen_about_equally_often():
    rounds, fraction = 500, 0.3
    times = Counter(client for i in range(rounds) for client in ids(choose(TEN, fraction, Round(i, seed=3))))
    deviation = (rounds * fraction * (1 - fraction)) ** 0.5
    assert all(abs(times[client.id] - rounds * fraction) < 4 * deviation for client in TEN)
