"""The weighted mean that merges are measured against."""

import math

import pytest
import torch

from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.mean_update import MeanUpdate, alike, batch, unbatch

from twins import apart, random_factor, truncated

SHAPES = {"layer.2.q": (48, 20), "layer.10.v": (20, 33), "layer.3.q": (48, 20)}


def update_of(rank, seed):
    return {name: random_factor(rank, out, in_, 10 * seed + i) for i, (name, (out, in_)) in enumerate(SHAPES.items())}


def terms_of(*ranks):
    return [(10.0 + 7 * i, update_of(rank, i)) for i, rank in enumerate(ranks)]


def mean_of(terms):
    mean = MeanUpdate()
    for weight, update in terms:
        mean = mean.add(weight, update)
    return mean


def dense_mean(terms):
    total = sum(weight for weight, _ in terms)
    return {name: sum(weight / total * update[name].product() for weight, update in terms) for name in SHAPES}


@pytest.mark.parametrize("ranks", [(3,), (2, 5, 1), (8, 8, 8, 8, 8, 8)])
def test_it_is_the_weighted_mean_of_the_products_as_factors_and_as_a_matrix(ranks):
    terms = terms_of(*ranks)
    base_update = mean_of(terms).factors()
    for name, matrix in dense_mean(terms).items():
        assert apart(base_update[name].product(), matrix) < 1e-12
        assert base_update[name].rank <= min(sum(ranks), *matrix.shape)


def test_a_mean_given_as_matrices_is_that_of_the_factors():
    terms = terms_of(2, 5, 1)
    assert MeanUpdate.of(dense_mean(terms)).error(mean_of(terms).factors()) < 1e-12


def test_its_best_fit_has_the_rank_of_each_module():
    terms = terms_of(4, 4, 4)
    template = {name: LowRank(b=f.b[:, : 2 + i], a=f.a[: 2 + i]) for i, (name, f) in enumerate(update_of(8, 9).items())}
    for name, part in mean_of(terms).best_fit(template).items():
        assert part.rank == template[name].rank
        assert apart(part.product(), truncated(dense_mean(terms)[name], part.rank)) < 1e-12


@pytest.mark.parametrize("ranks", [(3, 2), (8, 8, 8, 8, 8, 8)])
def test_the_error_is_the_distance_over_all_modules_relative_to_the_mean(ranks):
    terms, update, more = terms_of(*ranks), update_of(3, 8), update_of(2, 9)
    mean = dense_mean(terms)
    distance = math.hypot(*(float((update[n].product() + more[n].product() - x).norm()) for n, x in mean.items()))
    size = math.hypot(*(float(x.norm()) for x in mean.values()))
    assert mean_of(terms).error(update, more) == pytest.approx(distance / size)


def test_the_error_of_a_mean_that_is_zero_is_zero():
    still = {name: LowRank(b=0 * f.b, a=f.a) for name, f in update_of(3, 0).items()}
    assert MeanUpdate().add(2.0, still).error(still) == 0.0


def test_modules_of_one_shape_are_one_batch_and_come_back_as_they_were():
    adapter = update_of(3, 0)
    assert alike(adapter) == (("layer.2.q", "layer.3.q"), ("layer.10.v",))
    for names in alike(adapter):
        for name, part in unbatch(batch(adapter, names), names, torch.float64).items():
            assert torch.equal(part.b, adapter[name].b) and torch.equal(part.a, adapter[name].a)


def test_without_a_positive_weight_there_is_no_mean():
    with pytest.raises(ValueError, match="positive weight"):
        MeanUpdate().add(0.0, update_of(2, 0)).factors()
