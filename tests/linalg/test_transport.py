"""Distances between mixtures against slow twins: dense covariances, and every way to carry single grains."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.linalg.mixture import Mixtures, components
from fedlora.linalg.transport import gaussian_distances, mixture_distance, transport_cost


def drawn(seed: int, *counts: int, width: int = 5) -> Mixtures:
    """Mixtures of groups of so many points, of weights that are multiples of 1/4."""
    rng = torch.Generator().manual_seed(seed)
    sizes = components(torch.tensor(counts)).tolist()
    weights = [torch.tensor({0: [], 2: [1, 3], 3: [1, 2, 1]}[size]) / 4 for size in sizes]
    shape = (sum(sizes), width)
    return Mixtures(
        torch.tensor(counts), torch.cat(weights), torch.randn(shape, generator=rng), torch.rand(shape, generator=rng)
    )


def by_grains(mass: list[int], other: list[int], cost: Tensor) -> float:
    """The least cost over all ways to carry equally heavy grains one by one."""
    from_, to = ([i for i, n in enumerate(x) for _ in range(n)] for x in (mass, other))
    return min(float(cost[from_, list(way)].sum()) for way in set(permutations(to))) / len(from_)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def test_gaussians_are_as_far_apart_as_their_dense_covariances_say():
    one, other = drawn(0, 3), drawn(1, 2)
    found = gaussian_distances(one.means, one.variances, other.means, other.variances)
    for i in range(3):
        for j in range(2):
            x, y = one.variances[i].double().diag(), other.variances[j].double().diag()
            bures = (x + y - 2 * root(root(x) @ y @ root(x))).trace()
            assert_close(found[i, j], (one.means[i] - other.means[j]).double().square().sum() + bures)


@pytest.mark.parametrize(("mass", "other"), [((2, 3, 1), (1, 4, 1)), ((1, 5), (2, 2, 2)), ((6,), (1, 2, 3))])
def test_a_transport_is_as_cheap_as_the_cheapest_way_to_carry_grains(mass, other):
    cost = torch.rand(len(mass), len(other), generator=torch.Generator().manual_seed(len(mass)), dtype=torch.float64)
    found = transport_cost(torch.tensor(mass).double() / 6, torch.tensor(other) * 7.0, cost)
    assert found == pytest.approx(by_grains(list(mass), list(other), cost), rel=1e-9)


def test_mixtures_are_as_far_apart_as_two_nested_transports_say():
    one, other = drawn(0, 4, 0, 2), drawn(1, 2, 1, 2, 2)
    cost = gaussian_distances(one.means, one.variances, other.means, other.variances)
    grains = {2: [1, 3], 3: [1, 2, 1]}
    rows, columns = [3, 2], [2, 2, 2]
    between = torch.tensor(
        [[by_grains(grains[len(block)], grains[block.shape[1]], block) for block in strip.split(columns, 1)]
         for strip in cost.split(rows)], dtype=torch.float64
    )  # fmt: skip
    assert mixture_distance(one, other) == pytest.approx(by_grains([4, 2], [2, 2, 2], between), rel=1e-9)


def test_the_distance_is_symmetric_and_zero_for_the_same_mixtures():
    one, other = drawn(0, 4, 7, 2), drawn(1, 3, 1, 2)
    assert mixture_distance(one, other) == pytest.approx(mixture_distance(other, one), rel=1e-12)
    assert mixture_distance(one, other) > 1 and mixture_distance(one, one) == 0


def test_the_names_of_groups_and_the_number_of_points_do_not_matter():
    one, other = drawn(0, 4, 6), drawn(1, 3, 5)
    swapped = Mixtures(one.counts.flip(0), *(x.roll(3, 0) for x in (one.weights, one.means, one.variances)))
    many = replace(one, counts=one.counts * 10)
    for same in (swapped, many):
        assert mixture_distance(same, other) == pytest.approx(mixture_distance(one, other), rel=1e-12)


def test_who_has_no_mixture_is_infinitely_far_away():
    assert mixture_distance(drawn(0, 1, 0), drawn(1, 3, 5)) == math.inf == mixture_distance(drawn(1, 3, 5), drawn(0, 1, 1))
