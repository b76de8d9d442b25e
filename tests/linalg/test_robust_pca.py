import pytest
import torch

from fedlora.linalg.robust_pca import robust_pca, shrink_singular

from twins import apart


def columns(n=300, m=12, density=0.05, seed=0):
    rng = torch.Generator().manual_seed(seed)
    low = torch.randn(n, 1, generator=rng).double() @ torch.randn(1, m, generator=rng).double()
    sparse = 5 * torch.randn(n, m, generator=rng).double() * (torch.rand(n, m, generator=rng) < density)
    return low, sparse


def test_the_parts_add_up_to_the_columns():
    given = sum(columns())
    parts = robust_pca(given)
    assert apart(parts.low + parts.sparse, given) < 1e-6


def test_a_planted_low_rank_and_a_planted_sparse_part_are_found():
    low, sparse = columns(m=40)
    parts = robust_pca(low + sparse)
    assert apart(parts.low, low) < 1e-4
    assert apart(parts.sparse, sparse) < 1e-4
    assert torch.linalg.matrix_rank(parts.low, rtol=1e-4) == 1


def test_permuted_columns_have_permuted_parts():
    given, order = sum(columns()), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert apart(robust_pca(given[:, order]).sparse, robust_pca(given).sparse[:, order]) < 1e-6


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaled_columns_have_scaled_parts(scale):
    given = sum(columns())
    assert apart(robust_pca(scale * given).low, scale * robust_pca(given).low) < 1e-6


def test_identical_columns_have_no_sparse_part():
    given = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).double().expand(-1, 20).contiguous()
    assert float(robust_pca(given).sparse.norm() / given.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_batch_and_its_dtype_are_kept(dtype):
    given = torch.stack([sum(columns(seed=s)) for s in range(2)]).to(dtype)
    parts = robust_pca(given, steps=50)
    assert parts.low.dtype == dtype
    assert apart(parts.low[1], robust_pca(given[1], steps=50).low) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_zero_columns_have_zero_parts():
    parts = robust_pca(torch.zeros(20, 4))
    assert not parts.low.any()
    assert not parts.sparse.any()


@pytest.mark.parametrize("n", [40, 5])
def test_shrinking_through_the_gram_matrix_is_shrinking_the_singular_values(n):
    x = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    by = torch.tensor([0.5, 2.0]).double()[:, None, None]
    assert apart(shrink_singular(x, by), (u * (s - by[..., 0]).clamp_min(0)[..., None, :]) @ vt, scale=x) < 1e-12
