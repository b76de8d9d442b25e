from collections import Counter

import pytest

from fedlora.data.ranks import client_ranks

NAMES = ["uniform", "heavy-tail-light", "heavy-tail-strong", "normal"]


def test_without_a_choice_all_have_the_largest_rank():
    assert client_ranks(None, count=3, largest=8, seed=0) == [8, 8, 8]


def test_a_list_is_kept_as_it_is():
    assert client_ranks([1, 4, 2], count=3, largest=8, seed=0) == [1, 4, 2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("largest", [1, 2, 3, 8, 64])
def test_every_rank_lies_between_one_and_the_largest(name, largest):
    ranks = client_ranks(name, count=50, largest=largest, seed=0)
    assert len(ranks) == 50
    assert all(1 <= rank <= largest for rank in ranks)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_changes_who_has_a_rank_and_not_how_many_have_it(name):
    first, again, other = (client_ranks(name, count=40, largest=16, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


@pytest.mark.parametrize(("name", "most"), [("heavy-tail-light", 2), ("heavy-tail-strong", 16)])
def test_a_heavy_tail_gives_85_percent_of_the_clients_one_rank(name, most):
    assert Counter(client_ranks(name, count=100, largest=16, seed=0))[most] == 85


def test_uniform_gives_each_rank_to_a_quarter_and_normal_favours_the_middle():
    assert Counter(client_ranks("uniform", count=100, largest=16, seed=0)) == {2: 25, 4: 25, 8: 25, 16: 25}
    bell = Counter(client_ranks("normal", count=100, largest=16, seed=0))
    assert bell[4] == bell[8] > bell[2] == bell[16] > 0
