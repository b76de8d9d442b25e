"""Which examples go together in a step."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

_POOL = 32  # batches that are sorted together: enough to save nearly all padding, few enough to mix the examples


def epoch(
    lengths: Int[Tensor, " rows"], batch_size: int, by_length: bool, rng: torch.Generator
) -> Iterator[Int[Tensor, " batch"]]:
    """One pass over the rows in random order, cut into batches of row numbers; one batch may be smaller.

    With `by_length`, examples of similar length come together: a pool of 32 batches is sorted by length before it is cut,
    and the batches are shuffled. Which examples meet is still random, but no longer independent of their length.
    """
    order = torch.randperm(len(lengths), generator=rng)
    if not by_length:
        yield from torch.split(order, batch_size)
        return
    batches: list[Tensor] = []
    for pool in torch.split(order, _POOL * batch_size):
        batches += torch.split(pool[lengths[pool].argsort(stable=True)], batch_size)
    for i in torch.randperm(len(batches), generator=rng).tolist():
        yield batches[i]
