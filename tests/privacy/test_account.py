"""The account: published values, and laws that need none."""

import json
import math

import dp_accounting
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedlora.privacy.account import LEAST_NOISE, epsilon, noise_for, steps_for
from fedlora.privacy.events import Gaussian, Truncation, from_json, to_json

PUBLISHED = [  # noise multiplier, rate, count, delta, epsilon by RDP, by PLD; the first ones are tests of Opacus
    (1.5, 0.04, 2250, 1e-5, 7.3293, 6.7688),
    (1.3562, 0.04, 2000, 1e-5, 8.0004, 7.3831),
    (1.2915, 0.04, 2000, 1e-5, 8.6528, 7.9846),
    (1.416, 0.04, 2250, 1e-5, 7.9989, 7.3884),
    (1.34766, 0.04, 2250, 1e-5, 8.6437, 7.9834),
    (4.530877117, 1.0, 1, 1e-6, 1.0, 0.9274),
    (1.0, 0.01, 1000, 1e-5, 2.1014, 1.8282),
    (0.7, 0.01, 1000, 1e-5, 5.4233, 4.6183),
    (1.3, 250 / 60000, 3600, 1e-5, 0.9422, 0.8530),
    (1.0, 0.02, 200, 1e-3, 1.3910, 1.0998),
    (0.5, 0.02, 200, 1e-3, 9.76, None),
    (1.5, 0.02, 200, 1e-3, 0.63, None),
    (1.0, 0.1, 100, 1e-3, 5.6551, 4.7844),
    (5.0, 1.0, 50, 1e-3, 5.4200, 4.8453),
    (1.0, 1.0, 1, 1e-5, None, 4.3772),
    (1.0, 0.02, 260, 1e-3, None, 1.2614),
    (1.0, 0.08, 50, 1e-3, None, 2.601),  # the same noise in bands, 4 and 10 wide
    (1.0, 0.2, 20, 1e-3, None, 4.323),
]
CALIBRATED = [  # epsilon, delta, rate, steps, noise multiplier by PLD
    *((6.0, 1e-5, 1 / n, 500, z) for n, z in ((88, 0.613), (137, 0.553), (474, 0.446), (512, 0.441))),
    *((3.0, 1e-5, 1 / n, 500, z) for n, z in ((88, 0.773), (137, 0.685), (474, 0.548), (512, 0.541))),
    *((e, 1e-3, 0.02, 200, z) for e, z in ((1.0, 1.046), (3.0, 0.682), (8.0, 0.493))),
    *((e, 1e-5, 0.02, 200, z) for e, z in ((1.0, 1.370), (3.0, 0.826), (8.0, 0.580))),
    *((e, 1e-3, 0.1, 100, z) for e, z in ((1.0, 2.753), (3.0, 1.297), (8.0, 0.778))),
    *((e, 1e-3, 1.0, 50, z) for e, z in ((1.0, 18.2), (3.0, 7.34), (8.0, 3.39))),
]
FEW = [(1.0, 0.02, 200, 1e-3, 1.3910, 1.0998), (5.0, 1.0, 50, 1e-3, 5.4200, 4.8453)]


def composed(accountant, *events):
    for event, count in events:
        accountant.compose(event, count)
    return accountant


@pytest.mark.parametrize(
    ("noise", "rate", "count", "delta", "rdp", "pld"),
    [*FEW, *(pytest.param(*row, marks=pytest.mark.slow) for row in PUBLISHED if row not in FEW)],
)
def test_epsilon_has_the_published_value(noise, rate, count, delta, rdp, pld):
    ledger = [Gaussian(noise, rate, count)]
    if pld is not None:
        assert epsilon(ledger, delta) == pytest.approx(pld, rel=6e-4)
    if rdp is not None:
        assert epsilon(ledger, delta, "rdp") == pytest.approx(rdp, rel=1e-3 if rdp >= 1 else 1e-2)
    assert epsilon(ledger, delta) <= epsilon(ledger, delta, "rdp")


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps", "noise"),
    [
        (1.0, 1e-3, 1.0, 50, 18.2),
        (3.0, 1e-3, 0.02, 200, 0.682),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in CALIBRATED),
    ],
)
def test_the_noise_for_a_target_has_the_published_value_and_never_exceeds_the_target(target, delta, rate, steps, noise):
    found = noise_for(target, delta, rate, steps)
    assert found == pytest.approx(noise, rel=0.01)
    assert epsilon([Gaussian(found, rate, steps)], delta) <= target


@pytest.mark.parametrize(("ledger", "delta"), [([Gaussian(0.5, 0.2, 3)], 0.155933), ([Gaussian(3**0.5, 1.0, 3)], 0.126936)])
def test_the_published_delta_at_epsilon_1_gives_epsilon_1(ledger, delta):
    assert epsilon(ledger, delta) == pytest.approx(1.0, rel=1e-3)


def test_a_ledger_with_evaluations_has_the_published_epsilon():
    ledger = [Gaussian(1.0, 0.02, 200), Gaussian(20.0, count=10)]
    assert epsilon(ledger, 1e-3) == pytest.approx(1.18, rel=1e-3)


def test_a_ledger_is_the_composition_of_its_events():
    ledger = [Gaussian(1.0, 0.1, 8), Gaussian(2.0, 0.5, 3), Gaussian(1.0, 0.1, 2), Gaussian(9.0)]
    events = [(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)), 10), (PoissonSampledDpEvent(0.5, GaussianDpEvent(2.0)), 3)]
    for accountant, name in ((PLDAccountant(value_discretization_interval=1e-3), "pld"), (RdpAccountant(), "rdp")):
        by_hand = composed(accountant, *events, (GaussianDpEvent(9.0), 1)).get_epsilon(1e-4)
        assert epsilon(ledger, 1e-4, name) == pytest.approx(by_hand, rel=1e-3)


def test_releases_without_sampling_compose_to_one_release():
    assert epsilon([Gaussian(3.0, count=4)], 1e-5) == pytest.approx(epsilon([Gaussian(1.5)], 1e-5), rel=1e-9)
    assert epsilon([Gaussian(0.5)], 1e-5) == pytest.approx(9.9973, rel=1e-4)  # replaced units: half the noise


def test_no_release_costs_nothing_and_no_noise_everything():
    assert epsilon([], 1e-5) == epsilon([Gaussian(0.0, count=0)], 1e-5) == 0.0
    assert epsilon([Gaussian(1.0, 0.5, 3), Gaussian(0.0, 0.1, 1)], 1e-5) == math.inf
    assert noise_for(1.0, 1e-5, 0.1, 0) == 0.0
    assert steps_for(1.0, 1e-5, 0.1, 0.0) == 0


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 50), (0.3, 7), pytest.param(0.0123, 6000, marks=pytest.mark.slow)])
def test_noise_and_steps_for_a_budget_agree(rate, steps):
    noise = noise_for(2.0, 1e-4, rate, steps)
    most = steps_for(2.0, 1e-4, rate, noise)
    assert most >= steps
    assert epsilon([Gaussian(noise, rate, most)], 1e-4) <= 2.0
    assert epsilon([Gaussian(noise, rate, most + max(1, most // 2500))], 1e-4) > 2.0
    assert noise_for(2.0, 1e-4, rate, most + max(2, most // 20)) > noise


def test_a_budget_too_small_for_one_step_allows_none():
    assert steps_for(0.01, 1e-6, 0.5, 0.5) == 0


def test_similar_rates_share_the_result():
    found = [noise_for(2.0, 1e-4, rate, 7) for rate in (0.2985, 0.3)]
    assert found[0] == found[1]


def test_samples_get_no_less_than_the_least_noise():
    assert noise_for(5000.0, 1e-3, 0.5, 1) == pytest.approx(LEAST_NOISE)


def test_the_account_rejects_values_out_of_range():
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta = "):
            epsilon([Gaussian(1.0)], delta)
    for target in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="epsilon = "):
            noise_for(target, 1e-5, 0.1, 1)
    for wrong in ({"rate": 0.0}, {"rate": 1.5}, {"noise_multiplier": -1.0}, {"noise_multiplier": math.nan}, {"count": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Gaussian(**{"noise_multiplier": 1.0, **wrong})
    for largest, units in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match=f"largest = {largest}, units = {units}"):
            Truncation(largest, units)


def test_a_ledger_survives_json():
    ledger = [Gaussian(1.5, 0.25, 3), Gaussian(0.0), Gaussian(1.0, 0.5, 2, Truncation(7, 10))]
    assert from_json(json.loads(json.dumps(to_json(ledger)))) == ledger
    for wrong in ({"kind": "laplace"}, {"kind": "gaussian", "rate": 1.0}):
        with pytest.raises(ValueError, match="expected an event"):
            from_json([wrong])


def test_the_library_has_the_published_values_of_other_mechanisms():
    """Events that no mechanism of the package makes, which tell whether the library is the one of the published values."""
    special, replaced = NeighboringRelation.REPLACE_SPECIAL, NeighboringRelation.REPLACE_ONE
    for noise, expected in ((1.13, 18.7096), (8.83, 1.7732)):
        tree = dp_accounting.SingleEpochTreeAggregationDpEvent(noise, 1600)
        assert composed(RdpAccountant(neighboring_relation=special), (tree, 1)).get_epsilon(1e-6) == pytest.approx(
            expected, rel=1e-4
        )
    cohort = dp_accounting.SampledWithoutReplacementDpEvent(1000, 20, GaussianDpEvent(1.0))
    fixed = composed(RdpAccountant(neighboring_relation=replaced), (cohort, 200))
    assert fixed.get_epsilon(1e-3) == pytest.approx(2.3725, rel=1e-3)
    orders = [1.5, 2.5, 5, 50, 100]
    sampled = composed(RdpAccountant(orders), (PoissonSampledDpEvent(0.01, GaussianDpEvent(2.5)), 50))
    assert list(sampled.rdp) == pytest.approx([6.70580e-4, 1.08549e-3, 2.18076e-3, 2.38460e-2, 167.4163], rel=1e-4)
    concentrated = composed(RdpAccountant(), (dp_accounting.ZCDpEvent(0.5 / 3.0**2), 1))
    assert concentrated.get_epsilon(1e-5) == pytest.approx(epsilon([Gaussian(3.0)], 1e-5, "rdp"), rel=1e-6)
    assert dp_accounting.get_sigma_gaussian(1, 1e-5) == pytest.approx(3.73063, rel=1e-5)


def test_truncated_samples_have_the_published_epsilon():
    few = [Gaussian(1.0, 0.5, 3, Truncation(2, 4)), Gaussian(1.0, 0.5, 2, Truncation(2, 3))]
    assert epsilon(few, 1e-6) == pytest.approx(17.904330, rel=1e-3)
    assert epsilon([Gaussian(1.0, 0.02, 200, Truncation(40, 1000))], 1e-3) == pytest.approx(1.1017, rel=6e-4)


def test_a_ledger_with_truncated_samples_is_the_composition_of_its_events():
    ledger = [Gaussian(1.0, 0.1, 3, Truncation(12, 100)), Gaussian(2.0, 0.5, 3), Gaussian(1.0, 0.1, 2, Truncation(12, 100))]
    limited = dp_accounting.TruncatedSubsampledGaussianDpEvent(100, 0.1, 12, 1.0)
    by_hand = composed(
        PLDAccountant(value_discretization_interval=1e-3),
        (limited, 5),
        (PoissonSampledDpEvent(0.5, GaussianDpEvent(2.0)), 3),
    )
    assert epsilon(ledger, 1e-4) == pytest.approx(by_hand.get_epsilon(1e-4), rel=1e-3)


def test_the_smaller_the_largest_sample_the_larger_epsilon_which_rdp_does_not_bound():
    found = [epsilon([Gaussian(1.0, 0.1, 20, Truncation(most, 100))], 1e-3) for most in (10, 15, 99)]
    assert found[0] > found[1] > found[2] == pytest.approx(epsilon([Gaussian(1.0, 0.1, 20)], 1e-3), rel=1e-6)
    assert math.isnan(epsilon([Gaussian(1.0, 0.1, 20, Truncation(10, 100))], 1e-3, "rdp"))
    assert epsilon([Gaussian(0.0, 0.1, 20, Truncation(10, 100))], 1e-3, "rdp") == math.inf


def test_the_noise_for_a_target_covers_truncated_samples():
    limit = Truncation(12, 100)
    noise = noise_for(2.0, 1e-3, 0.1, 20, limit)
    assert 1.98 < epsilon([Gaussian(noise, 0.1, 20, limit)], 1e-3) <= 2.0
    assert noise > noise_for(2.0, 1e-3, 0.1, 20)


@pytest.mark.slow
def test_the_library_has_the_published_values_of_replaced_samples():
    event = SelfComposedDpEvent(PoissonSampledDpEvent(0.02, GaussianDpEvent(1.0)), 200)
    replaced = composed(PLDAccountant(NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-3), (event, 1))
    assert replaced.get_epsilon(1e-3) == pytest.approx(1.7200, rel=1e-3)
