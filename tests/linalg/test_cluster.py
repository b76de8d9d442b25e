"""Clusters of directions: against the definitions written out."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.linalg.cluster import clusters, directions, distances, pairwise, silhouette


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(items: int = 7, seed: int = 0) -> list[Tensor]:
    """Two blocks of unequal width; item 3 is zero in both."""
    found = [drawn(items, 12, seed=seed), drawn(items, 5, seed=seed + 1)]
    for block in found:
        block[3] = 0
    return found


def planted(groups: list[int], noise: float = 0.3) -> Tensor:
    """Distances between items that point nearly where their group does."""
    x = drawn(max(groups) + 1, 40)[groups] + noise * drawn(len(groups), 40, seed=1)
    return pairwise([directions(x)])


def linked(apart: Tensor, count: int) -> set[frozenset[int]]:
    """Average linkage, one merge after the other."""
    groups = [frozenset([i]) for i in range(len(apart))]
    while len(groups) > count:
        pairs = [(one, other) for i, one in enumerate(groups) for other in groups[:i]]
        near = min(
            pairs, key=lambda pair: sum(float(apart[i, j]) for i in pair[0] for j in pair[1]) / len(pair[0]) / len(pair[1])
        )
        groups = [group for group in groups if group not in near] + [near[0] | near[1]]
    return set(groups)


def plain_silhouette(apart: Tensor, labels: list[int]) -> float:
    """Kaufman and Rousseeuw's, item by item; 0 for an item alone."""
    total = 0.0
    for i, own in enumerate(labels):
        mean = {}
        for label in set(labels):
            others = [j for j, other in enumerate(labels) if other == label and j != i]
            mean[label] = sum(float(apart[i, j]) for j in others) / len(others) if others else None
        if (inside := mean.pop(own)) is not None:
            total += (min(mean.values()) - inside) / max(min(mean.values()), inside)
    return total / len(labels)


def test_distances_are_the_mean_of_one_minus_the_cosines():
    x = blocks()
    cosine = [torch.nn.functional.cosine_similarity(b[:, None].double(), b[None].double(), dim=-1) for b in x]
    expected = (1 - torch.stack(cosine).mean(0)).fill_diagonal_(0)
    assert_close(pairwise([directions(b) for b in x]), expected)


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_symmetric_between_0_and_2_and_0_on_the_diagonal(seed):
    found = pairwise([directions(b) for b in blocks(seed=seed)])
    assert torch.equal(found, found.mT) and not found.diagonal().any()
    assert found.isfinite().all() and found.min() >= 0 and found.max() <= 2
    opposite = pairwise([directions(torch.stack([x, -x])) for x in drawn(2, 9)])
    assert_close(opposite, torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64))


def test_an_item_of_zeros_has_distance_1_to_all_others():
    found = pairwise([directions(b) for b in blocks()])
    assert found[3].tolist() == [1, 1, 1, 0, 1, 1, 1]


def test_the_distance_from_a_mean_of_directions_is_the_mean_of_the_distances():
    x = [directions(b) for b in blocks()]
    found = distances([b[:1] for b in x], [b[1:].mean(0, keepdim=True) for b in x])
    assert_close(found[0, 0], pairwise(x)[0, 1:].mean())


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_of_average_linkage(seed, count):
    apart = pairwise([directions(drawn(7, 4, seed=seed))])
    found = clusters(apart, max_count=2, count=count)
    assert {frozenset(i for i in range(7) if found[i] == label) for label in found} == linked(apart, count)


@pytest.mark.parametrize("groups", [[0, 0, 1, 1], [0, 1, 0, 2, 2, 1, 2], [0, 1, 2, 3, 3, 2, 1, 0, 0]])
def test_planted_groups_are_found_and_numbered_in_the_order_of_their_first_items(groups):
    assert clusters(planted(groups), max_count=4) == groups


@pytest.mark.parametrize("seed", range(5))
def test_the_number_of_clusters_has_the_largest_silhouette(seed):
    apart = pairwise([directions(drawn(9, 3, seed=seed))])
    score = {k: plain_silhouette(apart, clusters(apart, max_count=2, count=k)) for k in (2, 3, 4, 5)}
    found = clusters(apart, max_count=5)
    assert max(found) + 1 == max(score, key=score.__getitem__)
    assert silhouette(apart, found) == pytest.approx(max(score.values()))


def test_no_more_clusters_are_made_than_allowed_and_fewer_than_items():
    apart = planted([0, 1, 2, 3, 3, 2, 1, 0])
    assert max(clusters(apart, max_count=3)) == 2
    assert max(clusters(planted([0, 1, 2]), max_count=4)) == 1
    assert clusters(planted([0, 1]), max_count=4) == [0, 0] and clusters(planted([0]), max_count=4) == [0]


def test_a_given_number_of_clusters_is_made_as_far_as_there_are_items():
    assert clusters(planted([0, 1]), max_count=4, count=2) == [0, 1]
    assert clusters(planted([0, 1]), max_count=4, count=3) == [0, 1]
    assert clusters(planted([0, 1, 2, 2]), max_count=4, count=1) == [0, 0, 0, 0]


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_one_cluster_or_all_single_items_have_no_silhouette(labels):
    assert silhouette(1 - torch.eye(3, dtype=torch.float64), labels) == 0
