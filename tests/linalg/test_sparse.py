"""Choosing the largest entries, and saying in bytes which they are."""

import pytest
import torch

from fedlora.linalg.sparse import largest, pack_positions, position_bytes, unpack_positions

SIZES = [
    (1, 9),
    (7, 9),
    (1, 255),
    (31, 256),
    (3, 257),
    (40, 400),
    (399, 400),
    (5, 70_000),
    (60_000, 70_000),
    (2, 2**24 + 9),
]


def some(count: int, total: int, seed: int = 0) -> torch.Tensor:
    places = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.zeros(total, dtype=torch.bool).index_fill(0, places, True)


@pytest.mark.parametrize(("count", "total"), [*SIZES, (0, 9), (9, 9), (0, 0), (1, 1)])
def test_positions_come_back_from_their_bytes(count, total):
    chosen = some(count, total)
    packed = pack_positions(chosen)
    assert packed.dtype == torch.uint8 and packed.shape == (position_bytes(count, total),)
    assert torch.equal(unpack_positions(packed, count, total), chosen)


@pytest.mark.parametrize(("count", "total"), SIZES)
def test_the_first_and_the_last_position_can_be_named(count, total):
    for chosen in (torch.arange(total) < count, torch.arange(total) >= total - count):
        assert torch.equal(unpack_positions(pack_positions(chosen), count, total), chosen)


@pytest.mark.parametrize("total", [9, 256, 257, 3000])
def test_no_more_bytes_than_a_bitmap_and_than_integers_are_used(total):
    width = 1 if total <= 256 else 2
    for count in range(1, total, 1 + total // 40):
        assert position_bytes(count, total) == min(-(-total // 8), count * width)


@pytest.mark.parametrize(("count", "total", "place"), [(3, 4000, 5), (3, 4000, 0), (2, 40, 1)])
def test_integers_that_repeat_descend_or_leave_the_range_are_refused(count, total, place):
    good = pack_positions(some(count, total))
    assert len(good) < total / 8
    highest, repeated = good.clone(), good.clone()
    highest[-1] = 255
    repeated[: len(good) // count] = good[len(good) // count : 2 * len(good) // count]
    for bad in (highest, repeated, good.flip(0) if len(good) == count else good.view(count, -1).flip(0).flatten()):
        with pytest.raises(ValueError, match=r"ascending numbers|positions out of"):
            unpack_positions(bad, count, total)


@pytest.mark.parametrize("change", [0, -1])
def test_a_bitmap_with_another_count_or_with_bits_beyond_the_end_is_refused(change):
    packed = pack_positions(some(20, 44))
    assert len(packed) == 6
    packed[change] ^= 0b10000000  # one of the 44, or one beyond them
    with pytest.raises(ValueError, match=r"expected 20 positions out of 44, got (19|21)"):
        unpack_positions(packed, 20, 44)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(5, dtype=torch.uint8),
        torch.zeros(6),
        torch.zeros(6, 1, dtype=torch.uint8),
        torch.zeros(6, dtype=torch.int8),
    ],
    ids=["too short", "floats", "two axes", "signed"],
)
def test_positions_of_the_wrong_form_are_refused(packed):
    with pytest.raises(ValueError, match="positions of 20 out of 44 are 6 bytes"):
        unpack_positions(packed, 20, 44)


@pytest.mark.parametrize("count", [0, 1, 7, 50])
def test_the_largest_are_those_of_a_stable_sort(count):
    sizes = torch.randint(6, (50,), generator=torch.Generator().manual_seed(count)).float()
    first = sizes.argsort(descending=True, stable=True)[:count]
    assert torch.equal(largest(sizes, count).nonzero().flatten(), first.sort().values)


def test_nan_counts_as_the_largest_so_that_it_is_seen():
    assert largest(torch.tensor([1.0, torch.nan, torch.inf, 2.0]), 2).tolist() == [False, True, True, False]
