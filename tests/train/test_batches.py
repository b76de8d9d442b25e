"""Which rows meet in a step."""

import pytest
import torch

from fedlora.train.batches import epoch

both = pytest.mark.parametrize("by_length", [True, False], ids=["by-length", "random"])
SKEWED = (1 + 400 * torch.rand(900, generator=torch.Generator().manual_seed(0)) ** 6).long()


def one(by_length: bool, seed: int = 0, lengths: torch.Tensor = SKEWED, size: int = 8) -> list[torch.Tensor]:
    return list(epoch(lengths, size, by_length, *(torch.Generator().manual_seed(seed + i) for i in (0, 100))))


@both
@pytest.mark.parametrize("rows", [1, 7, 8, 300, 900])
def test_every_row_comes_once_in_an_epoch(rows, by_length):
    assert torch.cat(one(by_length, lengths=SKEWED[:rows])).sort().values.tolist() == list(range(rows))


@both
@pytest.mark.parametrize("rows", [1, 7, 8, 256, 300, 900])
def test_all_batches_are_full_but_one_for_the_remainder(rows, by_length):
    full, rest = divmod(rows, 8)
    sizes = [len(batch) for batch in one(by_length, lengths=SKEWED[:rows])]
    assert sorted(sizes) == sorted([8] * full + [rest] * (rest > 0))


@both
def test_the_batches_depend_on_the_generator_alone(by_length):
    first = one(by_length, seed=3)
    torch.manual_seed(99)
    assert all(torch.equal(x, y) for x, y in zip(first, one(by_length, seed=3), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, one(by_length, seed=4), strict=True))


def padding(batches: list[torch.Tensor]) -> int:
    return sum(int(len(batch) * SKEWED[batch].max() - SKEWED[batch].sum()) for batch in batches)


def test_batches_by_length_need_less_than_a_fifth_of_the_padding():
    assert padding(one(by_length=True)) < padding(one(by_length=False)) / 5


@both
def test_two_epochs_of_one_generator_mix_the_rows_differently(by_length):
    rng = torch.Generator().manual_seed(0)
    first, second = ({frozenset(batch.tolist()) for batch in epoch(SKEWED, 8, by_length, rng, rng)} for _ in range(2))
    assert len(first & second) < len(first) / 10


def test_long_and_short_batches_come_in_no_order():
    means = torch.stack([SKEWED[batch].float().mean() for batch in one(by_length=True)])
    place = torch.arange(len(means)).float()
    assert abs(torch.corrcoef(torch.stack([means, place]))[0, 1]) < 0.3
