"""Sums and norms of matrices that are products of tokens, against the matrices."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.testing import assert_close

from fedlora.linalg.token_products import TokenProducts

OUT, IN = 7, 5
FEW, MANY = 3, 9
"""Tokens for which two Gram matrices are smaller than a matrix, and for which they are not."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def products(tokens: int, ids: bool) -> tuple[TokenProducts, Tensor]:
    """Of four rows, and the matrices."""
    p, q = drawn(4, tokens, OUT), drawn(4, tokens, IN)
    if ids:
        chosen = torch.arange(4 * tokens).view(4, tokens) ** 2 % IN
        return TokenProducts(p, chosen, (OUT, IN)), p.mT @ one_hot(chosen, IN).double()
    return TokenProducts(p, q, (OUT, IN)), p.mT @ q


@pytest.mark.parametrize("ids", [False, True], ids=["vectors", "token ids"])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_norms_and_weighted_sums_are_those_of_the_matrices(tokens, ids):
    found, matrices = products(tokens, ids)
    weights = drawn(4)
    assert_close(found.norms(), matrices.flatten(1).norm(dim=1), rtol=1e-12, atol=0)
    assert_close(found.weighted_sum(weights), torch.einsum("r,roi->oi", weights, matrices), rtol=1e-12, atol=1e-12)
    some = torch.tensor([2, 0])
    expected = torch.einsum("r,roi->oi", weights[some], matrices[some])
    assert_close(found.select(some).weighted_sum(weights[some]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [2, 40])
def test_rounding_never_makes_a_norm_smaller_where_tokens_cancel_each_other(tokens):
    """In fp32, with matrices that are a thousandth of their terms, or zero."""
    out, in_ = 64, 96
    p, q = drawn(100, tokens, out).float(), drawn(100, tokens // 2, in_).float().repeat(1, 2, 1)
    p[:, tokens // 2 :] = -p[:, : tokens // 2] * torch.linspace(1, 1.001, 100)[:, None, None]
    norms = (p.double().mT @ q.double()).flatten(1).norm(dim=1)
    found = TokenProducts(p, q, (out, in_)).norms()
    terms = (p.norm(dim=2) * q.norm(dim=2)).sum(1)
    assert (found >= norms * (1 - 1e-6)).all() and (found <= norms + 1e-3 * terms).all()


def test_a_row_that_is_not_finite_has_no_finite_norm():
    found, _ = products(FEW, False)
    found.p[1, 0, 0], found.q[2, 1, 1] = torch.inf, torch.nan
    assert found.norms().isfinite().tolist() == [True, False, False, True]
