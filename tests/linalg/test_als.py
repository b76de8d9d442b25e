from functools import partial
from itertools import pairwise

import pytest
import torch

from fedlora.linalg.als import Coefficients, affine, alternate, combined, descend, linear, objective
from fedlora.linalg.combine import mean, relative_error
from fedlora.linalg.lowrank import LowRank

from twins import apart, drifted_terms, random_factor, random_terms, total, truncated


def uneven(count, seed=0, **shape):
    """Terms that differ mostly in size, where coefficients help."""
    sizes = torch.randn(count, generator=torch.Generator().manual_seed(seed)).exp().tolist()
    return [
        (w, LowRank(b=size * f.b, a=f.a))
        for size, (w, f) in zip(sizes, drifted_terms(count, 3, 0.2, seed, **shape), strict=True)
    ]


def weights(terms):
    w = torch.tensor([w for w, _ in terms], dtype=torch.float64)
    return Coefficients(p=w, q=w)


def solved(terms, solver=alternate):
    layer = linear(terms)
    return combined(layer, solver([layer]))


def squared_error(factor, terms):
    return (factor.product() - total(terms)).square().sum((-2, -1))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_objective_is_the_dense_one(batch):
    terms = random_terms((3, 3, 3), batch=batch)
    rng = torch.Generator().manual_seed(0)
    at, layer = Coefficients(*torch.rand(2, *batch, 3, generator=rng, dtype=torch.float64)), linear(terms)
    torch.testing.assert_close(objective([layer], at), squared_error(combined(layer, at), terms))


@pytest.mark.parametrize("count", [3, 12])  # fewer and more ranks than the matrix has rows
def test_the_affine_objective_is_the_dense_one(count):
    terms, origin = random_terms((3,) * count), random_factor(3, seed=50)
    p, q = torch.rand(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at, layer = Coefficients(p=p, q=q), affine(terms, origin)
    torch.testing.assert_close(objective([layer], at), squared_error(combined(layer, at), terms))


def test_coefficients_weigh_the_factors_or_their_deviations_from_the_origin():
    terms, origin = random_terms((3, 3, 3)), random_factor(3, seed=50)
    at = Coefficients(*torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    plain, moved = combined(linear(terms), at), combined(affine(terms, origin), at)
    assert apart(plain.b, sum(p * f.b for p, (_, f) in zip(at.p, terms, strict=True))) < 1e-14
    assert apart(plain.a, sum(q * f.a for q, (_, f) in zip(at.q, terms, strict=True))) < 1e-14
    assert apart(moved.b, origin.b + sum(p * (f.b - origin.b) for p, (_, f) in zip(at.p, terms, strict=True))) < 1e-14
    assert apart(moved.a, origin.a + sum(q * (f.a - origin.a) for q, (_, f) in zip(at.q, terms, strict=True))) < 1e-14


@pytest.mark.parametrize("drift", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("form", ["linear", "affine"])
def test_single_precision_is_as_good_as_double_however_close_the_terms_are(drift, form):
    rng, start = torch.Generator().manual_seed(0), random_factor(3, seed=50, dtype=torch.float32)
    sizes = torch.randn(6, generator=rng).exp().tolist()
    moves = [random_factor(3, seed=i) for i in range(6)]
    terms = [
        (1 / 6, LowRank(b=start.b + (drift * size * m.b).float(), a=start.a + (drift * size * m.a).float()))
        for size, m in zip(sizes, moves, strict=True)
    ]
    exact = [(w, LowRank(b=f.b.double(), a=f.a.double())) for w, f in terms]
    make = linear if form == "linear" else partial(affine, origin=start)
    double = linear(exact) if form == "linear" else affine(exact, LowRank(b=start.b.double(), a=start.a.double()))
    layer = make(terms)
    error, least = (squared_error(combined(one, alternate([one])), exact) for one in (layer, double))
    assert float(error) <= float(least) * (1 + 1e-3)
    assert float(least) < 0.99 * float(squared_error(mean(exact), exact))


def test_the_objective_of_several_layers_is_their_sum():
    layers = [random_terms((3, 3), seed=s, in_=n) for s, n in ((1, 22), (2, 17))]
    blocks = [linear([(0.5, f) for _, f in terms]) for terms in layers]
    at = Coefficients(p=torch.tensor([0.3, 0.6]).double(), q=torch.tensor([0.5, 0.2]).double())
    torch.testing.assert_close(objective(blocks, at), objective(blocks[:1], at) + objective(blocks[1:], at))


def test_alternation_never_raises_the_objective():
    blocks = [linear(uneven(6))]
    values = [float(objective(blocks, alternate(blocks, sweeps=n))) for n in range(8)]
    assert all(later <= before * (1 + 1e-12) for before, later in pairwise(values))
    assert values[-1] < 0.9 * values[0]


def test_no_sweep_returns_the_mean_factors():
    terms = random_terms((3, 3, 3))
    found = solved(terms, partial(alternate, sweeps=0))
    assert apart(found.b, mean(terms).b) < 1e-14
    assert apart(found.a, mean(terms).a) < 1e-14


@pytest.mark.parametrize("seed", range(3))
def test_alternation_lies_between_the_mean_factors_and_the_best_fit(seed):
    terms = uneven(6, seed)
    error = float(relative_error(solved(terms), terms))
    assert apart(truncated(total(terms), 3), total(terms)) <= error <= float(relative_error(mean(terms), terms))


def test_alternation_does_no_worse_than_the_published_solver():
    terms = uneven(6)
    blocks = [linear(terms)]
    published = objective(blocks, descend(blocks))
    assert objective(blocks, alternate(blocks)) <= published * (1 + 1e-6)
    assert published < objective(blocks, weights(terms))


@pytest.mark.parametrize("form", ["linear", "affine"])
def test_identical_terms_are_reproduced_and_keep_their_factors(form):
    factor = random_factor(3)
    terms = [(0.25, factor)] * 4
    layer = affine(terms, random_factor(3, seed=7)) if form == "affine" else linear(terms)
    found = combined(layer, alternate([layer]))
    assert apart(found.b, factor.b) < 1e-10
    assert apart(found.a, factor.a) < 1e-10


def test_one_term_is_the_identity():
    terms = random_terms((3,))
    found = solved(terms)
    assert apart(found.b, terms[0][1].b) < 1e-12


def test_a_common_a_is_exact():
    terms = [(w, LowRank(b=f.b, a=random_factor(3).a)) for w, f in random_terms((3, 3, 3))]
    assert float(relative_error(solved(terms), terms)) < 1e-12


def test_two_terms_that_differ_in_size_only_are_exact():
    factor = random_factor(3)
    terms = [(0.5, factor), (0.5, LowRank(b=7 * factor.b, a=factor.a))]
    assert float(relative_error(solved(terms), terms)) < 1e-12


@pytest.mark.parametrize("solver", [alternate, partial(descend, steps=10)])
def test_one_pair_for_a_batch_is_one_pair_for_its_layers(solver):
    terms = uneven(4, batch=(3,))
    layers = [linear([(w, LowRank(b=f.b[i], a=f.a[i])) for w, f in terms]) for i in range(3)]
    together, apart_ = solver([linear(terms)], shared=True), solver(layers)
    assert together.p.shape == (4,)
    torch.testing.assert_close((together.p, together.q), (apart_.p, apart_.q))


def test_each_element_of_a_batch_has_its_own_pair():
    terms = uneven(4, batch=(3,))
    own = alternate([linear([(w, LowRank(b=f.b[1], a=f.a[1])) for w, f in terms])], sweeps=5)
    torch.testing.assert_close(alternate([linear(terms)], sweeps=5).p[1], own.p, rtol=1e-6, atol=1e-9)


def test_the_norms_of_the_factors_keep_their_ratio():
    terms = uneven(5)
    found, center = solved(terms), mean(terms)
    torch.testing.assert_close(found.b.norm() / found.a.norm(), center.b.norm() / center.a.norm())


def test_zero_terms_give_zero_and_no_nan():
    terms = [(0.5, LowRank(b=torch.zeros(30, 2), a=random_factor(2, dtype=torch.float32).a))] * 2
    for solver in (alternate, partial(descend, steps=10)):
        found = solved(terms, solver)
        assert not found.b.any()
        assert found.a.isfinite().all()
