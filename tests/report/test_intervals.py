"""Confidence intervals against scipy, slow twins and simulations."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from fedlora.report.intervals import Interval, over_seeds, over_seeds_and_clients


def clients(*values, weight=1.0):
    return {str(i): (float(value), weight) for i, value in enumerate(values)}


def test_the_interval_over_seeds_is_that_of_scipys_t_test():
    found, expected = over_seeds([0.3, 0.1, 0.45, 0.2]), stats.ttest_1samp([0.3, 0.1, 0.45, 0.2], 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("differences", [[0.1], [0.1, 0.1], [0.1, 0.3 - 0.2], [0.1, math.nan]])
def test_one_seed_equal_differences_and_nan_have_no_interval_over_seeds(differences):
    assert over_seeds(differences) is None


@pytest.mark.parametrize(("low", "high", "excludes"), [(0.1, 0.2, True), (-2.0, -1.0, True), (-0.1, 0.1, False)])
def test_an_interval_excludes_zero_if_it_is_on_one_side_of_it(low, high, excludes):
    assert Interval(low, high).excludes_zero == excludes


def level(count):
    """The level of the percentiles, expanded for this number of clients (Hesterberg 2015)."""
    return 1 - 2 * stats.norm.cdf(-math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1))


def test_for_one_seed_the_interval_is_scipys_percentile_bootstrap_of_its_clients():
    values = np.random.default_rng(3).normal(0.2, 1, 25)
    found = over_seeds_and_clients([float(values.mean())], [clients(*values)], False)
    options = {"confidence_level": level(25), "method": "percentile", "n_resamples": 20_000, "rng": 1}
    expected = stats.bootstrap((values,), np.mean, **options).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def plain_bootstrap(seeds, same_clients, resamples):
    """Quantiles of the hierarchical bootstrap, one resample after another."""
    rng, means = random.Random(1), []
    names = sorted({name for each in seeds for name in each})
    for _ in range(resamples):
        common, total = rng.choices(names, k=len(names)), 0.0
        for each in rng.choices(seeds, k=len(seeds)):
            drawn = [each[name] for name in (common if same_clients else rng.choices(names, k=len(names)))]
            total += sum(value * weight for value, weight in drawn) / sum(weight for _, weight in drawn)
        means.append(total / len(seeds))
    tail = (1 - level(len(names))) / 2
    return np.quantile(means, (tail, 1 - tail))


@pytest.mark.parametrize("same_clients", [False, True])
def test_the_bootstrap_of_seeds_and_clients_equals_a_plain_one(same_clients):
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 9, 8).astype(float).tolist()
    effect = rng.normal(0, 1, 8)  # of a client in all seeds
    seeds = [{str(i): (float(x), weights[i]) for i, x in enumerate(effect + rng.normal(0, 0.3, 8))} for _ in range(6)]
    means = [sum(v * w for v, w in each.values()) / sum(weights) for each in seeds]
    found, plain = over_seeds_and_clients(means, seeds, same_clients), plain_bootstrap(seeds, same_clients, 6000)
    by_seeds = over_seeds(means)
    assert found.low == pytest.approx(min(plain[0], by_seeds.low), abs=0.06)
    assert found.high == pytest.approx(max(plain[1], by_seeds.high), abs=0.06)


def test_the_interval_is_around_the_difference_on_all_examples_even_if_the_clients_mean_is_another():
    seeds = [clients(0.1, 0.3), clients(0.2, 0.5)]
    one, other = (over_seeds_and_clients([d, d + 0.1], seeds, False) for d in (0.2, 0.7))
    assert (other.low - one.low, other.high - one.high) == pytest.approx((0.5, 0.5))


def test_clients_without_a_finite_difference_are_left_out():
    with_nan = {**clients(0.1, 0.3, 0.2), "x": (math.nan, 1.0)}
    assert over_seeds_and_clients([0.2], [with_nan], False) == over_seeds_and_clients(
        [0.2], [clients(0.1, 0.3, 0.2)], False
    )


@pytest.mark.parametrize(
    "each", [[{}], [clients(0.1)], [clients(0.1, 0.1)], [clients(0.1, 0.3 - 0.2)], [clients(math.nan, math.nan)]]
)
def test_one_seed_whose_clients_do_not_vary_has_no_interval(each):
    assert over_seeds_and_clients([0.1], each, False) is None


def test_clients_that_are_missing_in_a_seed_leave_the_interval_finite():
    found = over_seeds_and_clients([0.1, 0.3], [{"a": (0.1, 1.0)}, {"b": (0.3, 1.0), "c": (0.2, 2.0)}], True)
    assert math.isfinite(found.low) and math.isfinite(found.high)


def coverage(seeds, of_seeds, of_clients, same_clients, runs=400, count=12):
    """The fraction of simulated comparisons whose interval contains the true difference, 0."""
    rng, inside = np.random.default_rng(5), 0
    for _ in range(runs):
        common = rng.normal(0, of_clients, count)
        each = [
            rng.normal(0, of_seeds)
            + (common + rng.normal(0, 0.1, count) if same_clients else rng.normal(0, of_clients, count))
            for _ in range(seeds)
        ]
        found = over_seeds_and_clients([float(x.mean()) for x in each], [clients(*x) for x in each], same_clients, 1000)
        inside += found.low <= 0 <= found.high
    return inside / runs


@pytest.mark.slow
@pytest.mark.parametrize("same_clients", [False, True])
@pytest.mark.parametrize(("of_seeds", "of_clients"), [(1.0, 0.1), (0.3, 1.0), (0.01, 1.0)])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_several_seeds_contain_the_true_difference_in_at_least_93_percent_of_simulations(
    seeds, of_seeds, of_clients, same_clients
):
    assert coverage(seeds, of_seeds, of_clients, same_clients) >= 0.93


@pytest.mark.slow
def test_a_percentile_bootstrap_of_three_seeds_alone_would_contain_the_true_difference_too_rarely():
    rng, inside = np.random.default_rng(0), 0
    for values in rng.normal(0, 1, (1000, 3)):
        low, high = np.quantile(rng.choice(values, (500, 3)).mean(1), (0.025, 0.975))
        inside += low <= 0 <= high
    assert inside / 1000 < 0.8
