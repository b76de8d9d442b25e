import pytest
import torch

from fedlora.linalg.combine import mean, relative_error
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.ridge_correction import CosineLoss, corrected, cross, descend, ridge

from twins import apart, drifted_terms, random_terms, total, truncated


def shared_a(terms):
    return [(w, LowRank(b=f.b, a=terms[0][1].a)) for w, f in terms]


def dense_loss(terms, x, strength, per_column, squared):
    center, m = mean(terms), total(terms)
    product = x @ center.a
    cosine = (
        torch.nn.functional.cosine_similarity(m, product, 0).mean()
        if per_column
        else (m * product).sum() / m.norm() / product.norm()
    )
    distance = (x - center.b).norm()
    return 1 - cosine + strength * (distance**2 if squared else distance)


@pytest.mark.parametrize("strength", [1e-6, 0.1, 10.0])
def test_ridge_is_the_dense_minimiser(strength):
    terms = random_terms((3, 3, 3), batch=(2,))
    center, m = mean(terms), total(terms)
    a = torch.cat([center.a, strength**0.5 * torch.eye(3, dtype=torch.float64).expand(2, -1, -1)], -1)
    wanted = torch.cat([m, strength**0.5 * center.b], -1)
    dense = torch.linalg.lstsq(a.mT, wanted.mT).solution.mT
    assert apart(corrected(terms, strength).b, dense) < 1e-11


def test_without_a_penalty_the_product_is_the_projection_on_the_mean_rows():
    terms = random_terms((3, 3, 3))
    v = torch.linalg.qr(mean(terms).a.mT).Q
    assert apart(corrected(terms, 0.0).product(), total(terms) @ v @ v.mT) < 1e-12


def test_a_large_penalty_leaves_the_mean_factors():
    terms = random_terms((3, 3, 3))
    assert apart(corrected(terms, 1e12).b, mean(terms).b) < 1e-10


@pytest.mark.parametrize("strength", [0.0, 0.01])
def test_identical_terms_are_not_corrected(strength):
    terms = random_terms((3,)) * 4
    assert apart(corrected(terms, strength).b, terms[0][1].b) < 1e-12


@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0])
def test_a_common_a_makes_the_mean_exact_and_kept(strength):
    terms = shared_a(random_terms((3, 3, 3)))
    assert apart(corrected(terms, strength).b, mean(terms).b) < 1e-12
    assert apart(corrected(terms, strength).product(), total(terms)) < 1e-12


@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0])
def test_the_correction_never_raises_the_penalised_error(strength):
    terms = random_terms((3, 3, 3))
    center, found, m = mean(terms), corrected(terms, strength), total(terms)
    before = (m - center.product()).square().sum()
    after = (m - found.product()).square().sum() + strength * (found.b - center.b).square().sum()
    assert after <= before


def test_the_correction_never_beats_the_best_fit():
    terms = random_terms((3, 3, 3))
    least = apart(truncated(total(terms), 3), total(terms))
    assert least <= float(relative_error(corrected(terms, 0.0), terms)) <= float(relative_error(mean(terms), terms))


def test_sums_of_crosses_in_a_second_pass_give_the_same_correction():
    terms = random_terms((3, 3, 3))
    center = mean(terms)
    summed = sum(w * cross(f, center.a) for w, f in terms)
    assert apart(ridge(center, summed, 0.1).b, corrected(terms, 0.1).b) < 1e-13


def test_a_mean_a_with_dependent_rows_is_corrected_without_blowing_up():
    wide = [(w, LowRank(b=torch.cat([f.b, f.b[:, :1]], -1), a=torch.cat([f.a, f.a[:1]]))) for w, f in random_terms((2, 2))]
    v = torch.linalg.qr(mean(wide).a[:2].mT).Q
    assert apart(corrected(wide, 0.0).product(), total(wide) @ v @ v.mT) < 1e-11


def test_the_correction_keeps_the_dtype():
    terms = drifted_terms(3, 2, 0.5, dtype=torch.bfloat16)
    assert corrected(terms, 0.01).b.dtype == torch.bfloat16
    assert apart(corrected(terms, 0.0).product(), total(terms)) < 0.5


def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match="strength >= 0"):
        corrected(random_terms((2, 2)), -1.0)


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_the_cosine_loss_and_its_gradient_are_the_dense_ones(per_column, squared):
    terms = random_terms((3, 3, 3), seed=2)
    loss = CosineLoss(terms, 0.3, per_column, squared)
    x = (mean(terms).b + 0.1 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()).requires_grad_()
    dense = dense_loss(terms, x, 0.3, per_column, squared)
    dense.backward()
    torch.testing.assert_close(loss.value(x), dense, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss.gradient(x), x.grad, rtol=1e-9, atol=1e-13)


def test_the_cosine_gradient_vanishes_at_the_ridge_without_penalty():
    terms = random_terms((3, 3, 3))
    loss, best = CosineLoss(terms, 0.0), corrected(terms, 0.0).b
    assert float(loss.gradient(best).norm()) < 1e-12
    m, v = total(terms), torch.linalg.qr(mean(terms).a.mT).Q
    torch.testing.assert_close(1 - loss.value(best), (m @ v).norm() / m.norm())


@pytest.mark.parametrize("per_column", [False, True])
def test_descent_lowers_the_cosine_loss(per_column):
    terms = random_terms((3, 3, 3), batch=(2,))
    loss = CosineLoss(terms, 0.01, per_column)
    found = descend(loss, steps=50, rate=0.1)
    assert (loss.value(found.b) < loss.value(mean(terms).b)).all()


def test_descent_of_identical_terms_stays():
    terms = random_terms((3,)) * 4
    assert apart(descend(CosineLoss(terms, 0.01), steps=20, rate=0.1).b, terms[0][1].b) < 1e-12
