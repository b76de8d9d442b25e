"""K-means in few dimensions against k-means on all numbers, and its agreement against every way to name groups."""

from itertools import permutations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.testing import assert_close

from fedlora.linalg.kmeans import agreement, embedded, kmeans


def drawn(count: int = 12, apart: float = 0.0, seed: int = 0) -> Tensor:
    """Points of 40 numbers around three places that lie so far apart, and far from zero."""
    rng = torch.Generator().manual_seed(seed)
    places = apart * torch.randn(3, 40, generator=rng).double()
    return torch.randn(count, 40, generator=rng).double() + places[torch.arange(count) % 3] + 100


def partition(groups: Tensor) -> set[frozenset[int]]:
    """The groups without their numbers."""
    return {frozenset((groups == group).nonzero().flatten().tolist()) for group in groups.unique()}


def test_embedded_points_are_as_far_from_each_other_as_the_given_ones():
    points = drawn()
    found = embedded(x.float() for x in points.split([7, 33], 1))
    assert found.shape == (12, 12)
    assert_close(torch.cdist(found, found), torch.cdist(points, points), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_scikit_learn_on_all_numbers(seed):
    points = drawn(20, apart=0.5, seed=seed)
    expected = KMeans(3, n_init=10, tol=0.0, random_state=seed).fit_predict(points.numpy())
    assert partition(kmeans(embedded([points]), 3, seed)) == partition(torch.tensor(expected))


def test_groups_that_lie_apart_are_found_and_numbered_as_they_occur():
    assert kmeans(embedded([drawn(apart=10.0)]), 3, 0).tolist() == [0, 1, 2] * 4


def test_the_order_of_points_does_not_matter_where_groups_lie_apart():
    points, order = drawn(apart=10.0), torch.tensor([5, 0, 7, 2, 11, 1, 3, 4, 6, 8, 10, 9])
    found = kmeans(embedded([points[order]]), 3, 0)
    assert partition(found[order.argsort()]) == partition(kmeans(embedded([points]), 3, 0))


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (1, 3), (3, 3), (2, 5)])
def test_with_no_more_points_than_groups_each_is_its_own(count, groups):
    assert kmeans(embedded([drawn(count)]), groups, 0).tolist() == list(range(count))


def test_equal_points_are_one_group_however_many_are_wanted():
    assert kmeans(embedded([torch.ones(6, 40)]), 3, 0).tolist() == [0] * 6


@pytest.mark.parametrize("numbers", [(3, 3), (2, 4), (4, 2), (1, 3)])
def test_agreement_is_that_of_the_best_way_to_name_the_groups(numbers):
    rng = torch.Generator().manual_seed(sum(numbers))
    groups, known = (torch.arange(9)[torch.randperm(9, generator=rng)] % n for n in numbers)
    names = permutations(range(max(numbers)))
    best = max(sum(way[g] == k for g, k in zip(groups.tolist(), known.tolist(), strict=True)) for way in names)
    assert agreement(groups, known) == pytest.approx(best / 9)
