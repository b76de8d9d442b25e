import pytest
import torch

from fedlora.linalg.combine import inner, leading, mean, norm, pad, relative_error, residual, stack, widen
from fedlora.linalg.fit import svd
from fedlora.linalg.lowrank import LowRank

from twins import IN, OUT, apart, drifted_terms, random_factor, random_terms, total


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_a_stack_is_the_sum_of_products_of_any_ranks(batch):
    terms = random_terms((2, 5, 1), batch=batch)
    stacked = stack(terms)
    assert stacked.rank == 8
    assert apart(stacked.product(), total(terms)) < 1e-14


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-6)])
def test_a_stack_keeps_the_dtype(dtype, tolerance):
    terms = random_terms((2, 3), dtype=dtype)
    assert stack(terms).b.dtype == dtype
    assert apart(stack(terms).product(), total(terms)) < tolerance


def test_the_order_of_the_terms_does_not_change_the_stacked_matrix():
    terms = random_terms((2, 5, 1))
    assert apart(stack(terms[::-1]).product(), stack(terms).product()) < 1e-14


def test_a_term_of_weight_zero_changes_no_stack():
    terms = random_terms((2, 3))
    assert apart(stack([*terms, (0.0, random_factor(4))]).product(), stack(terms).product()) < 1e-15


def test_no_terms_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        stack([])


def test_sizes_that_differ_are_refused_by_the_place_of_the_term():
    with pytest.raises(ValueError, match=r"term 1, b \[31, 2\]"):
        stack([(0.5, random_factor(2)), (0.5, random_factor(2, out=31))])


def test_ranks_that_differ_are_never_averaged():
    with pytest.raises(ValueError, match="term 1 has rank 1, term 0 has rank 4"):
        mean([(0.5, random_factor(4)), (0.5, random_factor(1))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_of_identical_factors_is_the_factor(dtype):
    factor = random_factor(3, dtype=dtype)
    found = mean([(0.1, factor)] * 10)
    torch.testing.assert_close(
        (found.b, found.a), (factor.b, factor.a), rtol=1e-15 if dtype == torch.float64 else 0, atol=0
    )


@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_mean_product_is_the_product_of_means_and_the_residual(batch):
    terms = random_terms((3, 3, 3, 3), batch=batch)
    assert apart(mean(terms).product() + residual(terms).product(), total(terms)) < 1e-14


def test_weights_of_means_and_residuals_are_shares():
    terms = random_terms((3, 3, 3))
    counts = [(17 * w, f) for w, f in terms]
    assert apart(residual(counts).product(), residual(terms).product()) < 1e-14
    assert apart(mean(counts).product(), mean(terms).product()) < 1e-14


def test_the_residual_of_m_terms_has_m_minus_one_times_the_rank():
    terms = random_terms((3,) * 4)
    found = residual(terms)
    assert found.rank == 9
    assert int(torch.linalg.matrix_rank(found.product())) == 9


def test_the_residual_is_the_covariance_of_the_factors():
    terms = random_terms((3,) * 4)
    center = mean(terms)
    covariance = sum(w * (f.b - center.b) @ (f.a - center.a) for w, f in terms)
    assert apart(residual(terms).product(), covariance) < 1e-13


@pytest.mark.parametrize("common", ["a", "b"])
def test_the_residual_vanishes_when_one_factor_is_common(common):
    first, *others = [f for _, f in random_terms((3,) * 4)]
    same = [LowRank(b=first.b, a=f.a) if common == "b" else LowRank(b=f.b, a=first.a) for f in (first, *others)]
    assert float(norm(residual([(0.25, f) for f in same]))) < 1e-15


def test_the_residual_of_one_term_has_no_rank():
    found = residual([(2.0, random_factor(3))])
    assert found.product().shape == (OUT, IN)
    assert found.rank == 0


def test_the_residual_of_nearly_equal_terms_keeps_its_digits():
    terms = drifted_terms(5, 3, drift=1e-4, dtype=torch.float32)
    center = mean([(w, LowRank(b=f.b.double(), a=f.a.double())) for w, f in terms])
    covariance = sum(w * (f.b - center.b) @ (f.a - center.a) for w, f in terms)
    assert apart(residual(terms).product(), covariance) < 1e-6


def test_padding_and_cutting_is_a_round_trip():
    factor = random_factor(3, batch=(2,))
    again = leading(pad(factor, 7), 3)
    assert torch.equal(again.b, factor.b)
    assert torch.equal(again.a, factor.a)
    assert torch.equal(pad(factor, 7).product(), factor.product())


def test_widening_changes_no_product_and_leaves_no_dead_rank():
    factor = random_factor(2, batch=(3,))
    wide = widen(factor, 5, torch.Generator().manual_seed(1))
    assert torch.equal(wide.product(), factor.product())
    rows = wide.a[..., 2:, :]
    assert 0.5 * IN**-0.5 < float(rows.abs().max()) <= IN**-0.5
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(wide.a, widen(factor, 5, torch.Generator().manual_seed(1)).a)


def test_widening_to_fewer_ranks_is_refused():
    with pytest.raises(ValueError, match="use `leading`"):
        widen(random_factor(4), 3, torch.Generator())


@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_inner_product_is_the_dense_one(batch):
    u, v = random_factor(3, batch=batch, seed=1), random_factor(5, batch=batch, seed=2)
    torch.testing.assert_close(inner(u, v), (u.product() * v.product()).sum((-2, -1)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_is_that_of_the_singular_values(dtype):
    factor = random_factor(4, dtype=dtype)
    s = svd([(1.0, factor)])[1]
    torch.testing.assert_close(norm(factor).double(), s.square().sum().sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 3e-7), (torch.float64, 1e-14)])
@pytest.mark.parametrize("count", [3, 40])  # factored, and dense because of too many ranks
def test_an_exact_update_shows_no_error(dtype, floor, count):
    terms = drifted_terms(count, 2, drift=0.1, dtype=dtype)
    assert float(relative_error(stack(terms), terms)) < floor


def test_a_tiny_error_is_measured_and_not_drowned():
    terms = drifted_terms(3, 2, drift=0.1, dtype=torch.float32)
    update = stack(terms)
    wrong = LowRank(b=update.b * (1 + 2**-18), a=update.a)
    assert float(relative_error(wrong, terms)) == pytest.approx(2**-18, rel=0.1)


def test_the_error_of_the_mean_factors_is_the_residual():
    terms = random_terms((3,) * 4)
    assert float(relative_error(mean(terms), terms) * norm(stack(terms))) == pytest.approx(float(norm(residual(terms))))
