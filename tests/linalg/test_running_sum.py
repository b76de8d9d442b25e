import pytest
import torch

from fedlora.linalg.fit import best_fit
from fedlora.linalg.running_sum import RunningSum

from twins import IN, OUT, apart, drifted_terms, random_factor, random_terms, total, truncated


def added(terms, **how):
    running = RunningSum(**how)
    for weight, factor in terms:
        running = running.add(weight, factor)
    return running


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("count", [1, 3, 60])
def test_terms_one_at_a_time_are_the_batch(dtype, close, count):
    terms = drifted_terms(count, 2, 0.5, dtype=dtype, batch=(2,))
    assert apart(added(terms).best_fit(4).product(), best_fit(terms, 4).product()) < close


def test_unnormalised_weights_are_scaled_at_the_end():
    terms = random_terms((2, 3, 1))
    counts = [(40 * w, f) for w, f in terms]
    assert apart(added(counts).best_fit(3, scale=1 / 40).product(), best_fit(terms, 3).product()) < 1e-12


def test_memory_does_not_grow_with_the_terms():
    running = added(drifted_terms(200, 2, 0.5, dtype=torch.float32))
    held = sum(f.b.numel() + f.a.numel() for f in running.factors) + running.matrix.numel()
    assert held <= 2 * OUT * IN


def test_adding_leaves_the_former_sum_as_it_was():
    terms = drifted_terms(60, 2, 0.5, dtype=torch.float32)
    before = added(terms)
    product = before.best_fit(3).product()
    added([], **vars(before)).add(1.0, random_factor(9, dtype=torch.float32))
    assert torch.equal(before.best_fit(3).product(), product)


def test_a_budget_bounds_the_ranks_and_the_error():
    terms = drifted_terms(40, 2, 0.3)
    running = added(terms, budget=6)
    assert sum(f.rank for f in running.factors) <= 12 + 2
    found = running.best_fit(14).product()
    distance = torch.linalg.matrix_norm(found - total(terms))
    assert 0 < float(distance) <= float(running.lost)
    assert apart(running.best_fit(2).product(), truncated(total(terms), 2)) < 0.05


def test_a_budget_above_the_rank_of_the_sum_loses_nothing():
    factor = random_factor(3)
    running = added([(0.1, factor)] * 10, budget=4)
    assert float(running.lost) < 1e-14
    assert apart(running.best_fit(3).product(), factor.product()) < 1e-13


def test_terms_of_other_sizes_are_refused():
    running = added(drifted_terms(60, 2, 0.5))
    with pytest.raises(ValueError, match="cannot add"):
        running.add(1.0, random_factor(2, out=7)).add(1.0, random_factor(2))


def test_an_empty_sum_cannot_be_fitted():
    with pytest.raises(ValueError, match="at least one"):
        RunningSum().best_fit(2)
