"""Composition of batches."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_POOL = 32  # batches sorted together: enough to avoid nearly all padding, few enough to mix the examples


def epoch(
    lengths: Int[Tensor, " rows"],
    batch_size: int,
    by_length: bool,
    rng: torch.Generator,
    shared_order_seed: torch.Generator,
) -> Iterator[Int[Tensor, " batch"]]:
    """One pass over the rows in random order, split into batches of row indices; one batch may be smaller.

    With `by_length`, batches have examples of similar length: a pool of 32 batches is sorted by length before it is split,
    and the batches are shuffled. The composition of batches is still random, but no longer independent of length. The
    shuffle uses `shared_order_seed` instead of `rng`, so that clients with equally many rows have short and long batches at
    the same time, which saves padding when they are trained together.
    """
    order = torch.randperm(len(lengths), generator=rng)
    if not by_length:
        yield from torch.split(order, batch_size)
        return
    batches: list[Tensor] = []
    for pool in torch.split(order, _POOL * batch_size):
        batches += torch.split(pool[lengths[pool].argsort(stable=True)], batch_size)
    for i in torch.randperm(len(batches), generator=shared_order_seed).tolist():
        yield batches[i]


def collate_clients(
    batches: Sequence[Int[Tensor, " _"]],
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, "batches longest"]]:
    """Batches of several clients as contiguous blocks of equal length, and a mask of the real rows. Shorter batches are
    padded with one of their rows, so that a filler row is never the longest example."""
    longest = max(len(batch) for batch in batches)
    filler = next(batch[:1] for batch in batches if len(batch))
    filled = [torch.cat([batch, filler.expand(longest - len(batch))]) for batch in batches]
    return torch.cat(filled), torch.arange(longest) < torch.tensor([len(batch) for batch in batches])[:, None]
