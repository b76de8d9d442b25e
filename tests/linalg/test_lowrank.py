"""Three kinds of factors, one matrix each: against sums written out."""

import pytest
import torch
from torch.testing import assert_close

from fedlora.linalg.lowrank import Heads, LowRank, Tri, block_diagonal

BATCHES = [(), (4,), (2, 3)]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_middle_factor_stands_between_the_outer_ones(batch):
    part = Tri(b=drawn(*batch, 12, 3), c=drawn(*batch, 3, 3), a=drawn(*batch, 3, 7))
    assert part.rank == 3
    assert_close(part.product(), torch.einsum("...or,...rs,...si->...oi", part.b, part.c, part.a))
    assert_close(part.pair().product(), part.product())


@pytest.mark.parametrize("batch", BATCHES)
def test_heads_are_the_sum_of_their_scaled_products(batch):
    part = Heads(b=drawn(*batch, 12, 6), c=drawn(*batch, 3, 2, 2), s=drawn(*batch, 3), a=drawn(*batch, 6, 7))
    alone = [
        part.s[..., i, None, None]
        * part.b[..., 2 * i : 2 * i + 2]
        @ part.c[..., i, :, :]
        @ part.a[..., 2 * i : 2 * i + 2, :]
        for i in range(3)
    ]
    assert part.rank == 6
    assert_close(part.product(), sum(alone))
    assert_close(part.pair().product(), part.product())


@pytest.mark.parametrize("batch", BATCHES)
def test_blocks_are_put_on_the_diagonal_in_their_order(batch):
    blocks = drawn(*batch, 3, 2, 2)
    expected = [torch.block_diag(*three) for three in blocks.reshape(-1, 3, 2, 2)]
    assert torch.equal(block_diagonal(blocks), torch.stack(expected).reshape(*batch, 6, 6))


def test_two_factors_are_their_own_pair():
    part = LowRank(b=drawn(12, 3), a=drawn(3, 7))
    assert part.pair() is part
