import pytest
import torch

from fedlora.linalg import fit
from fedlora.linalg.combine import leading, norm
from fedlora.linalg.fit import best_fit, gram, leading_eigenvectors, recompress, svd, truncate
from fedlora.linalg.lowrank import LowRank

from twins import IN, OUT, apart, drifted_terms, random_factor, random_terms, total, truncated

CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("ranks", [(2, 4, 3), (8, 9, 10), (5,)])  # fewer columns than min(out, in), more, one term
def test_best_fit_is_the_truncated_dense_svd(dtype, rank, ranks):
    terms = random_terms(ranks, seed=rank, dtype=dtype)
    assert apart(best_fit(terms, rank).product(), truncated(total(terms), rank)) < CLOSE[dtype]


@pytest.mark.parametrize(("out", "in_"), [(22, 30), (30, 22), (64, 3), (3, 64)])
def test_best_fit_of_tall_and_wide_matrices(out, in_):
    terms = random_terms((2, 2, 2, 2), out=out, in_=in_, dtype=torch.float32)
    assert apart(best_fit(terms, 2).product(), truncated(total(terms), 2)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drift", [0, 1e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("count", [4, 40])
def test_best_fit_of_nearly_dependent_factors(dtype, drift, count):
    terms = drifted_terms(count, 3, drift, dtype=dtype)
    dense = total(terms)
    assert apart(best_fit(terms, 3).product(), truncated(dense, 3), scale=dense) < CLOSE[dtype]
    assert apart(best_fit(terms, 8).product(), truncated(dense, 8), scale=dense) < CLOSE[dtype]


def test_best_fit_survives_cancellation_between_terms():
    u, v = random_factor(3, dtype=torch.float32), random_factor(3, seed=9, dtype=torch.float32)
    near = LowRank(b=u.b + 1e-3 * v.b, a=u.a)
    terms = [(1.0, near), (-1.0, u)]
    assert apart(best_fit(terms, 3).product(), total(terms)) < 1e-6


def test_best_fit_under_weights_of_very_different_size():
    terms = [(w, f) for w, (_, f) in zip((1e6, 1.0, 1e-6), random_terms((2, 2, 2), dtype=torch.float32), strict=True)]
    assert apart(best_fit(terms, 6).product(), total(terms)) < 1e-6
    assert apart(best_fit(terms[1:], 4).product(), total(terms[1:])) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_fit_of_singular_values_over_six_decades(dtype):
    factor = random_factor(8)
    u, v = torch.linalg.qr(factor.b).Q, torch.linalg.qr(factor.a.mT).Q
    s = torch.logspace(0, -6, 8, dtype=torch.float64)
    terms = [(1.0, LowRank(b=(u * s).to(dtype), a=v.mT.to(dtype)))]
    for rank in (2, 5, 8):
        assert apart(best_fit(terms, rank).product(), truncated(total(terms), rank), scale=total(terms)) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_the_tail_of_the_singular_values(dtype):
    terms = random_terms((3, 3, 3), dtype=dtype)
    tail = torch.linalg.svdvals(total(terms))[4:].square().sum().sqrt()
    error = torch.linalg.matrix_norm(best_fit(terms, 4).product().double() - total(terms))
    torch.testing.assert_close(error, tail, rtol=CLOSE[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_fitted_as_its_elements_are(dtype):
    terms = random_terms((3, 4), batch=(2, 3), dtype=dtype)
    batched = best_fit(terms, 2).product()
    single = best_fit([(w, LowRank(b=f.b[1, 2], a=f.a[1, 2])) for w, f in terms], 2).product()
    assert apart(batched[1, 2], single) < CLOSE[dtype]


def test_a_batch_too_large_for_one_piece_is_fitted_in_pieces(monkeypatch):
    terms = random_terms((3, 4), batch=(5,), dtype=torch.float32)
    whole = best_fit(terms, 2).product()
    monkeypatch.setattr(fit, "_CHUNK", {"cpu": 2 * 7 * (OUT + IN)})
    assert apart(best_fit(terms, 2).product(), whole) < 1e-6


def test_one_term_of_smaller_rank_is_a_fixed_point():
    factor = random_factor(3, dtype=torch.float32)
    assert apart(best_fit([(1.0, factor)], 5).product(), factor.product()) < 1e-6


def test_identical_terms_are_one_term():
    factor = random_factor(3, dtype=torch.float32)
    assert apart(best_fit([(0.1, factor)] * 10, 3).product(), factor.product()) < 1e-6


def test_a_smaller_rank_is_the_leading_part_of_a_larger_one():
    terms = random_terms((3, 4, 2), dtype=torch.float32)
    assert apart(leading(best_fit(terms, 6), 2).product(), best_fit(terms, 2).product()) < 1e-6


def test_without_training_singular_values_decay_with_the_mass_of_the_ranks():
    start = best_fit(random_terms((4, 4)), 4)
    before = torch.linalg.svdvals(start.product())[:4]
    shares, ranks, current = (0.5, 0.3, 0.2), (4, 2, 1), start
    for _ in range(3):
        current = best_fit([(w, leading(current, r)) for w, r in zip(shares, ranks, strict=True)], 4)
    mass = torch.tensor([1.0, 0.8, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(current.product())[:4], before * mass**3)


def test_the_left_split_puts_the_singular_values_into_b():
    found = best_fit(random_terms((3, 4), dtype=torch.float32), 5)
    torch.testing.assert_close(found.a @ found.a.mT, torch.eye(5), rtol=0, atol=1e-6)
    gram = found.b.mT @ found.b
    torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-6)
    assert torch.equal(gram.diag().sort(descending=True).values, gram.diag())


def test_the_balanced_split_shares_them_equally():
    terms = random_terms((3, 4))
    found = best_fit(terms, 5, "balanced")
    s = torch.linalg.svdvals(total(terms))[:5]
    torch.testing.assert_close(found.b.mT @ found.b, s.diag())
    torch.testing.assert_close(found.a @ found.a.mT, s.diag())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("split", ["left", "balanced"])
def test_unused_ranks_can_still_learn(dtype, split):
    found = best_fit([(0.5, random_factor(2, dtype=dtype))] * 2, 6, split)
    assert torch.equal(found.b[:, 2:], torch.zeros_like(found.b[:, 2:]))
    rows = found.a[2:].double()
    assert (rows.abs().sum(-1) > 0).all()
    assert 0.5 * IN**-0.5 < float(rows.abs().max()) <= IN**-0.5 * 1.01
    assert torch.linalg.matrix_rank(rows) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 20])
def test_the_best_fit_of_zero_is_zero_with_live_rows(dtype, count):
    zero = LowRank(b=torch.zeros(2, OUT, 3, dtype=dtype), a=torch.zeros(2, 3, IN, dtype=dtype))
    found = best_fit([(1.0, zero)] * count, 4)
    assert not found.b.any()
    assert (found.a.abs().sum(-1) > 0).all()


def test_best_fit_is_deterministic():
    terms = random_terms((3, 4), dtype=torch.float32)
    first, second = best_fit(terms, 9), best_fit(terms, 9)
    assert torch.equal(first.b, second.b)
    assert torch.equal(first.a, second.a)


@pytest.mark.parametrize("dtype", CLOSE)
def test_truncate_is_best_fit_of_a_dense_matrix(dtype):
    terms = random_terms((9, 9, 9), batch=(2,))
    matrix = total(terms).to(dtype)
    assert apart(truncate(matrix, 4).product(), truncated(matrix, 4)) < CLOSE[dtype]
    assert truncate(matrix, 4).b.dtype == dtype


@pytest.mark.parametrize("ranks", [(2, 4, 3), (8, 9, 10)])
def test_the_svd_of_a_sum_is_the_dense_svd(ranks):
    terms = random_terms(ranks, batch=(2,))
    u, s, vt = svd(terms)
    torch.testing.assert_close(s, torch.linalg.svdvals(total(terms))[..., : s.shape[-1]], rtol=1e-10, atol=1e-14)
    assert apart((u * s[..., None, :]) @ vt, total(terms)) < 1e-13
    assert apart(vt @ vt.mT, torch.eye(s.shape[-1], dtype=torch.float64).expand(2, -1, -1)) < 1e-13


def test_the_svd_is_orthonormal_where_singular_values_vanish():
    zero = LowRank(b=torch.zeros(OUT, 3), a=random_factor(3, dtype=torch.float32).a)
    u, s, vt = svd([(1.0, zero)])
    assert not s.any()
    torch.testing.assert_close(vt @ vt.mT, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(u.mT @ u, torch.eye(3, dtype=torch.float64))


def test_orthonormal_rows_pass_noise_through_unchanged():
    _, _, vt = svd([(1.0, random_factor(4))])
    noise = random_factor(4, seed=5).b
    torch.testing.assert_close(norm(LowRank(b=noise, a=vt)), torch.linalg.matrix_norm(noise))


def test_recompress_finds_the_numerical_rank():
    terms = random_terms((2, 3))
    doubled = LowRank(b=torch.cat([f.b for _, f in terms] * 2, -1), a=torch.cat([f.a for _, f in terms] * 2, -2))
    found = recompress(doubled)
    assert found.rank == 5
    assert apart(found.product(), doubled.product()) < 1e-12
    assert recompress(LowRank(b=torch.zeros(OUT, 3), a=torch.zeros(3, IN))).rank == 0


def test_recompress_loses_no_more_than_the_tolerance():
    factor = random_factor(8)
    found = recompress(factor, tolerance=0.3)
    assert found.rank < 8
    assert apart(found.product(), factor.product()) <= 0.3


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("n", [1, 7, 300, 450])  # below and above where a part is computed
def test_gram_is_the_product_with_its_transpose(n, batch):
    x = torch.randn(*batch, n, 40, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    torch.testing.assert_close(gram(x), x @ x.mT)
    torch.testing.assert_close(gram(x.contiguous().mT.contiguous().mT), x @ x.mT)


@pytest.mark.parametrize("n", [50, 300])
def test_leading_eigenvectors_span_what_the_largest_eigenvalues_have(n):
    x = torch.randn(2, n, n + 20, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = leading_eigenvectors(x @ x.mT, 5)
    torch.testing.assert_close(found.mT @ found, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    largest = torch.linalg.eigvalsh(x @ x.mT)[..., -5:]
    torch.testing.assert_close(torch.linalg.vecdot(found, (x @ x.mT) @ found, dim=-2), largest)


@pytest.mark.parametrize("matrix", [torch.zeros(300, 300), torch.eye(300), torch.ones(300, 300)])
def test_leading_eigenvectors_are_orthonormal_where_eigenvalues_are_equal(matrix):
    found = leading_eigenvectors(matrix.double(), 5)
    torch.testing.assert_close(found.mT @ found, torch.eye(5, dtype=torch.float64))
