"""Kinds of factors, against sums written out."""

import pytest
import torch
from torch.testing import assert_close

from fedlora.linalg.lowrank import LowRank, block_diagonal
from fedlora.parts.experts import Experts
from fedlora.parts.heads import Heads
from fedlora.parts.three_factor import ThreeFactor

BATCHES = [(), (4,), (2, 3)]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_middle_factor_stands_between_the_outer_ones(batch):
    part = ThreeFactor(b=drawn(*batch, 12, 3), c=drawn(*batch, 3, 3), a=drawn(*batch, 3, 7))
    assert part.rank == 3
    assert_close(part.product(), torch.einsum("...or,...rs,...si->...oi", part.b, part.c, part.a))
    assert_close(part.as_two_factors().product(), part.product())


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
    assert_close(part.as_two_factors().product(), part.product())


@pytest.mark.parametrize("batch", BATCHES)
def test_blocks_are_put_on_the_diagonal_in_their_order(batch):
    blocks = drawn(*batch, 3, 2, 2)
    expected = [torch.block_diag(*three) for three in blocks.reshape(-1, 3, 2, 2)]
    assert torch.equal(block_diagonal(blocks), torch.stack(expected).reshape(*batch, 6, 6))


def experts(batch: tuple[int, ...], others: int) -> Experts:
    return Experts(
        b=drawn(*batch, 12, 3),
        a=drawn(*batch, 3, 7),
        g=drawn(*batch, 2 * others + 1, 7),
        others_b=drawn(*batch, others, 12, 3),
        others_a=drawn(*batch, others, 3, 7),
    )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("others", [1, 3])
def test_shares_are_the_largest_of_the_softmax_normalised_again_and_added_up_by_expert(others, batch):
    part, x, count = experts(batch, others), drawn(*batch, 40, 7), others + 1
    found, slots = part.weights(x), (x @ part.g.mT).softmax(-1)
    for share, slot in zip(found.flatten(0, -2), slots.flatten(0, -2), strict=True):
        kept = torch.where(slot >= slot.sort().values[-count], slot, 0.0)
        kept = kept / kept.sum()
        assert_close(share, torch.cat([kept[:count].sum()[None], kept[count:]]))


@pytest.mark.parametrize("lean", [0.0, 3.0, 30.0])
def test_shares_add_up_to_one_and_the_own_expert_always_counts(lean):
    part, x = experts((), 3), drawn(500, 7).abs()
    part.g[4:] += lean  # towards the others
    shares = part.weights(x)
    assert_close(shares.sum(-1), torch.ones(500, dtype=torch.float64))
    assert (shares[:, 0] > 0).all() and (shares >= 0).all()
    assert lean < 30 or shares[:, 0].mean() < 0.01


@pytest.mark.parametrize("batch", BATCHES)
def test_experts_side_by_side_are_the_sum_of_their_products(batch):
    part = experts(batch, 2)
    pair = part.concat_factors()
    assert pair.rank == 3 * part.rank
    assert_close(pair.product(), part.b @ part.a + (part.others_b @ part.others_a).sum(-3))
    assert_close(pair.b[..., : part.rank] @ pair.a[..., : part.rank, :], part.b @ part.a)


def test_two_factors_are_their_own_pair():
    part = LowRank(b=drawn(12, 3), a=drawn(3, 7))
    assert part.as_two_factors() is part
