"""Audits: the published bounds, valid in theory and in practice, and mechanisms that do not do what they claim."""

import math

import pytest
import torch
from scipy.stats import binom

from fedlora.privacy.account import epsilon
from fedlora.privacy.audit import audit_mechanism, coins, judge, lower_bound
from fedlora.privacy.events import Gaussian
from fedlora.randomness import generator

SHAPES = {"layer.b": (20, 4), "layer.a": (4, 30), "head": (10, 20)}  # 400 entries
CLIP, DELTA = 0.5, 1e-5


def mechanism(noise_multiplier, clips=True, weight=1.0, noiseless=()):
    """A mechanism that clips to CLIP and adds noise, or claims to."""

    def release(terms, seed):
        rng, total = generator(seed, "noise"), {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for term in terms:
            norm = math.sqrt(sum(float(x.square().sum()) for x in term.values()))
            factor = weight * (min(1.0, CLIP / norm) if clips else 1.0)
            for name, x in term.items():
                total[name] += factor * x
        for name, x in total.items():
            noise = torch.randn(x.shape, generator=rng)
            x += noise_multiplier * CLIP * noise * (name not in noiseless)
        return total

    return release


def bound_of(release, seed=0, canaries=400, each=40, **changes):
    return audit_mechanism(release, SHAPES, canaries, each, 10 * CLIP, DELTA, seed, **changes).bound


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "bound"),
    [
        (1000, 1000, 600, 0.0, 0.2975),
        (1000, 1000, 600, 1e-5, 0.2972),
        (1000, 200, 180, 1e-5, 1.7963),
        (1000, 100, 100, 1e-5, 3.4654),
        (100, 100, 100, 0.0, 3.4930),
    ],
)
def test_the_bound_has_the_published_value(canaries, guesses, correct, delta, bound):
    assert lower_bound(canaries, guesses, correct, delta) == pytest.approx(bound, abs=6e-5)


@pytest.mark.parametrize("guesses", [1, 5, 100])
def test_without_delta_the_bound_of_right_guesses_alone_is_that_of_a_binomial(guesses):
    rate = 0.05 ** (1 / guesses)
    assert lower_bound(guesses, guesses, guesses, 0.0) == pytest.approx(max(0.0, math.log(rate / (1 - rate))), abs=1e-5)


def test_half_of_the_guesses_or_fewer_show_nothing():
    assert lower_bound(1000, 100, 50, 1e-5) == lower_bound(1000, 100, 0, 1e-5) == 0.0


@pytest.mark.parametrize(("true", "guesses"), [(0.5, 60), (2.0, 60), (4.0, 300)])
def test_the_bound_exceeds_the_epsilon_of_randomized_response_in_at_most_5_percent(true, guesses):
    chance = 1 / (1 + math.exp(-true))  # of each guess, if the mechanism tells the coins with this epsilon
    false = sum(
        binom.pmf(correct, guesses, chance)
        for correct in range(guesses + 1)
        if lower_bound(guesses, guesses, correct, 0.0) > true
    )
    assert 0.005 < false <= 0.05


def test_guesses_are_the_highest_and_the_lowest_scores():
    included = torch.tensor([True, True, False, False, True, False])
    found = judge(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), included, 2, 0.0)
    assert (found.canaries, found.guesses, found.correct) == (6, 4, 3)
    assert judge(-included.float(), included, 3, 0.0).correct == 0
    for each in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3 guesses"):
            judge(torch.zeros(6), included, each, 0.0)


def test_coins_are_fair_and_their_own_for_each_seed():
    assert abs(coins(10000, 0).float().mean() - 0.5) < 0.02
    assert not torch.equal(coins(100, 0), coins(100, 1)) and torch.equal(coins(100, 0), coins(100, 0))


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0, 5.0])
def test_a_mechanism_that_does_what_it_claims_stays_below_its_epsilon(noise):
    claimed = epsilon([Gaussian(noise)], DELTA)
    assert all(bound_of(mechanism(noise), seed) <= claimed for seed in range(5))


def test_false_alarms_are_rare_over_200_seeds():
    claimed = epsilon([Gaussian(5.0)], DELTA)
    alarms = sum(bound_of(mechanism(5.0), seed, canaries=60, each=15) > claimed for seed in range(200))
    assert alarms <= 10


@pytest.mark.parametrize(
    "broken",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": 0.5},
        {"noise_multiplier": 5.0, "clips": False},
        {"noise_multiplier": 5.0, "weight": 16.0},  # an upload that counts by its examples
    ],
    ids=["no noise", "too little noise", "no clip", "weights"],
)
def test_a_broken_mechanism_is_caught(broken):
    claimed = epsilon([Gaussian(5.0)], DELTA)
    assert all(bound_of(mechanism(**broken), seed) > claimed for seed in range(3))


def test_a_group_of_tensors_without_noise_is_caught_by_an_audit_of_the_group():
    claimed = epsilon([Gaussian(5.0)], DELTA)

    def only_head(terms, seed):
        return mechanism(5.0, noiseless=("head",))(({**ZEROS, **term} for term in terms), seed)

    found = audit_mechanism(only_head, {"head": SHAPES["head"]}, 200, 40, 10 * CLIP, DELTA, 0)
    assert found.bound > claimed


def test_several_releases_show_more_than_one():
    bounds = [bound_of(mechanism(3.0), releases=count) for count in (1, 20)]
    assert bounds[0] < bounds[1] <= epsilon([Gaussian(3.0, count=20)], DELTA)


def test_the_bound_of_a_gaussian_release_has_the_published_mean():
    shapes = {"x": (1000,)}

    def release(noise):
        return lambda terms, seed: {
            "x": sum(t["x"] for t in terms) + noise * torch.randn(1000, generator=generator(seed, "n"))
        }

    for noise, mean in ((0.5, 3.465), (1.0, 1.66), (2.0, 0.57)):
        bounds = [audit_mechanism(release(noise), shapes, 1000, 50, 1.0, DELTA, seed).bound for seed in range(5)]
        assert sum(bounds) / 5 == pytest.approx(mean, abs=0.35)


def test_more_canaries_than_coordinates_are_rejected():
    with pytest.raises(ValueError, match="at most 400 canaries"):
        audit_mechanism(mechanism(1.0), SHAPES, 401, 10, 1.0, DELTA, 0)


def test_the_text_names_the_bound_and_what_could_be_found():
    text = judge(torch.arange(10.0), torch.arange(10) > 4, 5, 0.0).text()
    assert "1.05" in text and "10 of 10 guesses about 10 canaries" in text


ZEROS = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
